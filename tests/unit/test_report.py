"""The report of a run: one file that fetches nothing, and nothing a row says can act in it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftcore.data.audit import Audit, SplitFacts, Tally
from ftcore.history import remember
from ftcore.report import write_report
from ftcore.report.chart import Curve, nice_ticks, png, svg
from ftcore.report.journal_view import Series, duration, figures, read_journal, series
from ftcore.rundir import RunDir
from ftcore.storage import seal

EVIL = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred \u202egnp.exe [x](javascript:alert(3)) \ud800"


def step_line(step: int, loss: float) -> dict[str, Any]:
    values = {"step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100 * step, "trained_tokens": 60 * step}
    return {**values, "tokens_per_s": 50.0, "seconds": 2.0 * step, "time": 0.0, "num_steps": 100}


def journal(num_steps: int = 40) -> list[dict[str, Any]]:
    lines = [step_line(step, 4 / step) for step in range(1, num_steps + 1)]
    return [*lines, {"step": num_steps, "validation_loss": 0.25, "perplexity": 1.28, "time": 0.0}]


def audit_saying(text: str) -> Audit:
    audit = Audit(read=100, splits={"train": SplitFacts(rows=90, tokens=900, trained=300, blocks=10, room=1000)}, notes=[text])
    audit.rejected = {"empty answer": Tally(10, [text])}
    audit.trained, audit.lengths, audit.answers, audit.stopped = {"assistant": 300}, {16: 90}, 90, 90
    return audit


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path, "night")
    run.folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in journal()).encode())
    run.folder.write_json("audit.json", audit_saying("format alpaca").to_json())
    run.folder.write("recipe.yaml", b"name: night\n")
    return run


def page_of(run: RunDir, **options: str) -> str:
    write_report(run, **options)
    return run.folder.read("report.html").decode()


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_has_no_script_and_names_no_other_address(run: RunDir) -> None:
    tags = Elements(page_of(run)).tags
    assert not [
        tag for tag, attributes in tags if tag in ("script", "link", "iframe", "object", "img") or {"src", "href"} & set(attributes)
    ]


@pytest.mark.parametrize("place", ["audit", "recipe", "comparison", "published", "history"])
def test_what_a_stranger_wrote_is_shown_and_cannot_act(run: RunDir, place: str) -> None:
    if place == "audit":
        run.folder.write_json("audit.json", audit_saying(EVIL.replace("\ud800", "")).to_json())
    if place == "recipe":
        run.folder.write("recipe.yaml", EVIL.encode("utf-8", "surrogatepass"))
    if place == "published":
        run.folder.write_json("published.json", {"ref": EVIL.replace("\ud800", ""), "store": "s"})
    if place == "history":
        remember(run, "failure", rank=1, cause=EVIL.replace("\ud800", ""), final=False)
    page = page_of(run, comparison=EVIL if place == "comparison" else "")
    tags = Elements(page).tags
    assert not [tag for tag, attributes in tags if tag in ("script", "img") or any(name.startswith("on") for name in attributes)]
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)


def test_the_page_shows_figures_audit_and_recipe(run: RunDir) -> None:
    page = page_of(run)
    for expected in ("best validation loss", "0.25", "rejected: empty answer", "90.0%", "name: night", "format alpaca", "<svg"):
        assert expected in page, expected


def test_an_unfinished_run_says_so_and_a_finished_one_too(run: RunDir) -> None:
    before = page_of(run)
    run.folder.write_json("final/result.json", {"steps": 40, "chosen_step": 40, "world_size": 2, "metrics": {}})
    seal(run.folder / "final")
    assert ("not finished" in before, "not finished" in page_of(run)) == (True, False)


def test_a_run_without_one_step_has_a_page(tmp_path: Path) -> None:
    assert "No step was trained yet" in page_of(RunDir(tmp_path, "empty"))


def test_curves_png_is_a_picture(run: RunDir) -> None:
    write_report(run)
    assert run.folder.read("curves.png").startswith(b"\x89PNG")


def test_a_remote_run_folder_gets_its_report_too(run: RunDir) -> None:
    remote = RunDir("memory://reports", "night")
    remote.folder.write("metrics.jsonl", run.folder.read("metrics.jsonl"))
    assert write_report(remote) == f"{remote.folder}/report.html"
    assert b"<svg" in remote.folder.read("report.html")


def test_a_journal_line_cut_short_by_a_kill_is_left_out(run: RunDir) -> None:
    run.folder.write("metrics.jsonl", run.folder.read("metrics.jsonl") + b'{"step": 41, "lo')
    assert [line["step"] for line in read_journal(run.folder)][-2:] == [40, 40]


def test_a_repeated_step_counts_once_and_the_last_time() -> None:
    assert series([step_line(1, 9.0), step_line(2, 8.0), step_line(2, 7.0)], "loss") == Series((1, 2), (9.0, 7.0))


def test_values_that_are_not_finite_are_not_drawn() -> None:
    assert series([step_line(1, math.nan), step_line(2, math.inf), step_line(3, 1.0)], "loss").steps == (3,)


def test_thinning_keeps_the_spike() -> None:
    values = [1.0] * 10_000
    values[1234] = 99.0
    thinned = Series(tuple(range(10_000)), tuple(values)).thinned(200)
    assert len(thinned.steps) <= 400 and max(thinned.values) == 99.0


def test_figures_tell_the_best_validation_and_when() -> None:
    lines = [*journal(), {"step": 20, "validation_loss": 0.125, "perplexity": 1.1, "time": 0.0}]
    assert figures(lines)["best validation loss (step 20)"] == "0.125"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.7, 0.7), (-3.0, 5.0), (1e-6, 2e-4), (1600, 1601), (0.0, 0.0)])
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= high - step * 1e-6 and 2 <= len(ticks) <= 9
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_a_chart_of_one_point_can_be_drawn() -> None:
    curve = Curve("loss", Series((1,), (2.0,)))
    assert "nan" not in svg(curve) and png([curve]).startswith(b"\x89PNG")


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (2.25, 42, 185, 8040)] == ["2.2 s", "42 s", "3 min 05 s", "2 h 14 min"]


def test_the_page_tells_what_happened_beside_the_steps(run: RunDir) -> None:
    assert "What happened" not in page_of(run)
    remember(run, "began", step=0, changed={})
    remember(run, "failure", rank=1, cause="process 7 died", final=False)
    remember(run, "group", size=1)
    remember(run, "went on", step=20, changed={"resources.workers": (2, 1)})
    page = page_of(run)
    for words in ("worker 1: process 7 died", "1 worker from the newest", "after step 20 with another resources.workers: 2 became 1"):
        assert words in page
