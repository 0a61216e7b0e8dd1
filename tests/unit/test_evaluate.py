"""`ftcore evaluate` and `ftcore compare` in one process: who is judged on what, what is refused beforehand, what a stop costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from pipelines import evaluate
from tests.answering import Answering, answering


def conversation(number: int, answer: str = "") -> dict[str, Any]:
    question = f"What is {number} plus {number}?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or f"It is {2 * number}."}]
    return {"messages": turns}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server() -> Iterator[Answering]:
    with answering() as told:
        yield told


def test_the_better_system_is_found_and_a_stopped_evaluation_asks_nobody_again(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write(tmp_path / "rows.jsonl", [conversation(n) for n in range(150)]), tmp_path / "out"
    good, poor = f"{server.url}#good", f"{server.url}#poor"
    command = ["--rows", str(rows), "--systems", poor, good, "--out", str(out), "--here"]
    assert evaluate.main(command) == 0
    told = capsys.readouterr().out
    assert f"{good} is better than {poor} by 50.0 points (exact match)" in told and "cannot tell" not in told
    results = json.loads((out / "results.json").read_text())
    assert [line["measured"]["exact_match"]["interval"]["value"] for line in results["lines"]] == [0.4, 0.9]
    assert len(server.questions("good")) == 150
    parts = sorted((out / "answers" / results["lines"][1]["key"]).glob("*.parquet"))
    assert len(parts) == 2
    parts[1].unlink()
    assert evaluate.main(command) == 0
    assert len(server.questions("good")) == 150 + 22 and len(server.questions("poor")) == 150
    capsys.readouterr()
    assert main(["compare", str(out), good, poor]) == 0
    assert f"{good} is better than {poor} by 50.0 points" in capsys.readouterr().out
