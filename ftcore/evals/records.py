"""Records: the folder of an evaluation: what was asked, what each system made of it, window by window, so that a stopped one goes on.

In: questions, Given rows. Out: the same, read back. Runs in: the driver, workers.

    evaluation.json                     what makes two evaluations the same one: rows, task, limits
    questions/part-00000.parquet        WINDOW questions each, in the order of the rows
    answers/<system>-<digest>/part-00000.parquet    what one system made of that window; a part that is there is not made again
    support/<by>-<digest>/<system>-<digest>/part-00000.parquet    how far sources support those answers, where somebody looked
    judgements/<pair>-<digest>/                     what a judge said about two systems (ftcore/evals/replies.py)
    results.json, results.md, results.html          at the end; systems that are added later find the others' answers there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ftcore.errors import DataError
from ftcore.evals import asked, given
from ftcore.evals.asked import Asked
from ftcore.evals.given import Given
from ftcore.parts import claim, read_table, write_table
from ftcore.storage import Folder

WINDOW = 128
"""Rows of one part, and what a stopped worker asks again at most, of each system."""
FLOAT = pa.float64()
JOB, RESULTS = "evaluation.json", "results.json"


class Records:
    """One folder; opened wherever it is written to or read."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)

    def claim(self, facts: dict[str, Any]) -> None:
        """Makes the folder this evaluation's. Raises ConfigError when it holds another one."""
        claim(self.folder, JOB, facts, "this folder holds another evaluation")

    def write_questions(self, rows: Sequence[Asked]) -> list[int]:
        """Returns the number of rows of each window."""
        windows = [rows[at : at + WINDOW] for at in range(0, len(rows), WINDOW)]
        for number, window in enumerate(windows):
            write_table(self.folder, _part("questions", number), asked.to_table(window))
        return list(map(len, windows))

    def questions(self, number: int | None = None) -> list[Asked]:
        """Of one window, or all."""
        keys = [_part("questions", number)] if number is not None else self._parts("questions")
        return [row for key in keys for row in asked.from_table(read_table(self.folder, key))]

    def has(self, system: str, number: int) -> bool:
        return self.folder.exists(_part(f"answers/{system}", number))

    def write(self, system: str, number: int, rows: Sequence[Given]) -> None:
        write_table(self.folder, _part(f"answers/{system}", number), given.to_table(rows))

    def answers(self, system: str) -> list[Given]:
        return [row for key in self._parts(f"answers/{system}") for row in given.from_table(read_table(self.folder, key))]

    def has_support(self, by: str, system: str, number: int) -> bool:
        return self.folder.exists(_part(f"{by}/{system}", number))

    def write_support(self, by: str, system: str, number: int, found: Mapping[str, float | None]) -> None:
        """Of rows, by their ids; None where nobody could tell."""
        write_table(self.folder, _part(f"{by}/{system}", number), pa.table({"id": list(found), "support": pa.array(found.values(), FLOAT)}))

    def support(self, by: str, system: str) -> dict[str, float | None]:
        tables = [read_table(self.folder, key) for key in self._parts(f"{by}/{system}")]
        return {row["id"]: row["support"] for table in tables for row in table.to_pylist()}

    def results(self) -> dict[str, Any]:
        """Raises DataError for an evaluation that was not finished."""
        if not self.folder.exists(RESULTS):
            raise DataError(
                "this folder holds no finished evaluation", where=self.folder, wanted=RESULTS, remedy="finish it: the same ftcore evaluate"
            )
        return dict(self.folder.read_json(RESULTS))

    def _parts(self, key: str) -> list[str]:
        return [f"{key}/{name}" for name in self.folder.names(key) if name.endswith(".parquet")]


def _part(key: str, number: int) -> str:
    return f"{key}/part-{number:05d}.parquet"
