"""Judgement: what a judge made of two systems as files: JSON, Markdown, and one self-contained HTML page without script.

In: a Judgement. Out: result.json, result.md and result.html in the judgement's folder, and a line on the page of the evaluation that they
belong to. Runs in: a person's terminal; the driver of an evaluation.
"""

from __future__ import annotations

import ftcore
from ftcore.card import utc_now
from ftcore.evals.judgement import Judgement
from ftcore.report import page_environment
from ftcore.storage import Folder

JSON, MARKDOWN, HTML = "result.json", "result.md", "result.html"
FOLDER, PAGE = "judgements", "results.html"
"""Of an evaluation."""
BEGIN, END = "<!-- judgements -->", "<!-- end of judgements -->"
"""On its page; nothing that comes from rows or names can hold them, for it is escaped."""


def write_judgement(folder: Folder, found: Judgement) -> None:
    page = page_environment().get_template("judgement.html.jinja").render(
        found=found, sentence=found.sentence(), notes=found.notes(), cells=found.cells(), place=str(folder), made=utc_now(),
        tool=f"ftcore {ftcore.__version__}",
    )  # fmt: skip
    folder.write(HTML, page.encode("utf-8", errors="replace"))
    folder.write(MARKDOWN, found.markdown().encode("utf-8", errors="replace"))
    folder.write_json(JSON, found.to_json())


def list_judgements(folder: Folder) -> None:
    """Writes the sentence of each judgement, with its link, onto the page of an evaluation that is finished."""
    if not folder.exists(PAGE):
        return
    page = folder.read(PAGE).decode("utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        places = [f"{FOLDER}/{name}" for name in folder.names(FOLDER) if folder.exists(f"{FOLDER}/{name}/{JSON}")]
        found = [(f"{place}/{HTML}", folder.read_json(f"{place}/{JSON}")) for place in places]
        lines = page_environment().get_template("judged.html.jinja").render(found=found)
        folder.write(PAGE, f"{before}{BEGIN}\n{lines}{END}{after}".encode())
