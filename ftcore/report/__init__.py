"""Report: one self-contained HTML page and one PNG of curves about a run, safe to open whatever its rows and names hold.

In: a run's folder (recipe.yaml, audit.json, metrics.jsonl, history.json, final/, published.json; each may be missing). Out: report.html
and curves.png in it. Runs in: the driver, after a run or in the middle of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import ftcore
from ftcore.card import utc_now
from ftcore.data.audit import Audit
from ftcore.data.audit_table import printable_lines
from ftcore.history import recall, told
from ftcore.report.chart import Curve, png, svg
from ftcore.report.journal_view import figures, read_journal, series
from ftcore.rundir import RunDir

HTML, PNG = "report.html", "curves.png"
KNOWN = {
    "step", "epoch", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_s", "seconds", "time", "num_steps", "skipped",
}  # fmt: skip


def write_report(run: RunDir, *, comparison: str = "") -> str:
    """Writes both files into the run's folder and returns where the page is. `comparison`: further text to show, a table of evaluations."""
    lines = read_journal(run.folder)
    curves = drawn_curves(lines)
    if curves:
        run.folder.write(PNG, png(curves))
    page = page_environment().get_template("report.html.jinja").render(
        name=run.name, place=run.url, made=utc_now(), tool=f"ftcore {ftcore.__version__}",
        finished=run.is_finished(), steps=run.checkpoint_steps(),
        figures=figures(lines), charts=[(curve, svg(curve)) for curve in curves], audit=_audit(run), recipe=_text(run, "recipe.yaml"),
        published=_json(run, "published.json"), result=_json(run, "final/result.json"), comparison=comparison,
        history=told(recall(run)),
    )  # fmt: skip
    run.folder.write(HTML, page.encode("utf-8", errors="replace"))
    return f"{run.folder}/{HTML}"


def drawn_curves(lines: list[dict[str, Any]]) -> list[Curve]:
    """The curves there is something to draw for; what a stage adds to the journal (a margin, a reward) comes last."""
    others = sorted({key for line in lines if "loss" in line for key in line} - KNOWN)
    curves = [
        Curve("loss", series(lines, "loss"), series(lines, "validation_loss"), "per trained token"),
        Curve("learning rate", series(lines, "lr"), noisy=False),
        Curve("gradient norm", series(lines, "grad_norm"), unit="before clipping"),
        Curve("throughput", series(lines, "tokens_per_s"), unit="tokens/s"),
        *(Curve(key, series(lines, key)) for key in others),
    ]
    return [curve for curve in curves if curve]


def page_environment() -> Environment:
    """Templates of pages that are safe to open whatever rows and names hold."""
    environment = Environment(
        loader=PackageLoader("ftcore.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_shown,
    )  # fmt: skip
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    return environment


def _shown(value: Any) -> Any:
    """Every string that enters the page has its control characters and direction marks written out; markup of ours stays markup."""
    return printable_lines(value) if type(value) is str else value


def _audit(run: RunDir) -> Audit | None:
    found = _json(run, "audit.json")
    return Audit.from_json(dict(found)) if found else None


def _json(run: RunDir, key: str) -> Mapping[str, Any]:
    return dict(run.folder.read_json(key)) if run.folder.exists(key) else {}


def _text(run: RunDir, key: str) -> str:
    return run.folder.read(key).decode("utf-8", errors="replace") if run.folder.exists(key) else ""
