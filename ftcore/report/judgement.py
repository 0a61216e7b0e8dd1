"""Judgement: what a judge made of two systems as files: JSON, Markdown, and one self-contained HTML page without script.

In: a Judgement. Out: result.json, result.md and result.html in the judgement's folder. Runs in: a person's terminal.
"""

from __future__ import annotations

import ftcore
from ftcore.card import utc_now
from ftcore.evals.judgement import Judgement
from ftcore.report import page_environment
from ftcore.storage import Folder

JSON, MARKDOWN, HTML = "result.json", "result.md", "result.html"


def write_judgement(folder: Folder, found: Judgement) -> None:
    page = page_environment().get_template("judgement.html.jinja").render(
        found=found, sentence=found.sentence(), notes=found.notes(), cells=found.cells(), place=str(folder), made=utc_now(),
        tool=f"ftcore {ftcore.__version__}",
    )  # fmt: skip
    folder.write(HTML, page.encode("utf-8", errors="replace"))
    folder.write(MARKDOWN, found.markdown().encode("utf-8", errors="replace"))
    folder.write_json(JSON, found.to_json())
