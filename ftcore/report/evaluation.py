"""Evaluation: results as files: JSON, Markdown, and one self-contained HTML page without script, whatever rows and answers hold.

In: Results. Out: results.json, results.md, results.html in the evaluation's folder. Runs in: the driver.
"""

from __future__ import annotations

import ftcore
from ftcore.card import utc_now
from ftcore.evals.records import RESULTS
from ftcore.evals.results import Results
from ftcore.report import page_environment
from ftcore.report.judgement import list_judgements
from ftcore.storage import Folder

HTML, MARKDOWN = "results.html", "results.md"


def write_page(folder: Folder, results: Results) -> None:
    """Writes all three, the JSON last: it says that the evaluation is finished."""
    page = page_environment().get_template("evaluation.html.jinja").render(
        about=results.about, notes=results.notes(), cells=results.cells(), kinds=results.by_kind(), sentences=results.sentences(),
        examples=results.examples,
        place=str(folder), made=utc_now(), tool=f"ftcore {ftcore.__version__}",
    )  # fmt: skip
    folder.write(HTML, page.encode("utf-8", errors="replace"))
    list_judgements(folder)
    folder.write(MARKDOWN, results.markdown().encode("utf-8", errors="replace"))
    folder.write_json(RESULTS, results.to_json())
