"""`ftcore compare --judge`: a judge asked in both orders about finished answers, over HTTP; what it may cost; when it is not believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.evals import endpoint
from pipelines import evaluate
from tests.answering import answering
from tests.judges import Judges, judging

NUM_ROWS = 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A folder of answers, the good system (right 9 times in 10) and the poor one (4 in 10)."""
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.jsonl"
    turns = [(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(NUM_ROWS)]
    rows.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
                            for q, a in turns))  # fmt: skip
    with answering() as server:
        good, poor = f"{server.url}#good", f"{server.url}#poor"
        assert evaluate.main(["--rows", str(rows), "--systems", good, poor, "--out", str(folder / "out"), "--here"]) == 0
    yield folder / "out", good, poor


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judges]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    with judging() as server:
        yield server


class Run:
    """One finished evaluation in a folder of its own, and what the last command said."""

    def __init__(self, folder: Path, good: str, poor: str, judges: Judges, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.good, self.poor, self.judges, self.capsys = folder, good, poor, judges, capsys
        self.out = self.err = ""

    def __call__(self, model: str, *more: str) -> int:
        self.capsys.readouterr()
        code = main(["compare", str(self.folder), self.good, self.poor, "--judge", f"{self.judges.url}#{model}", *more])
        captured = self.capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    def places(self) -> list[Path]:
        return sorted((self.folder / "judgements").iterdir())

    def result(self) -> dict[str, Any]:
        (place,) = self.places()
        return dict(json.loads((place / "result.json").read_text()))


@pytest.fixture
def run(finished: tuple[Path, str, str], judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    import shutil

    shutil.copytree(finished[0], tmp_path / "out")
    return Run(tmp_path / "out", finished[1], finished[2], judges, capsys)


def test_the_better_system_wins_and_nothing_is_asked_twice(run: Run) -> None:
    """good is wrong where n % 10 is 0, poor where it is 0 to 5: on 1 in 10 rows both say the same, on 4 in 10 both are right."""
    assert run("fair") == 0
    assert f"{run.good} is better than {run.poor} by 50.0 points (win rate)" in run.out
    result = run.result()
    assert result["outcomes"] == {"ours": 30, "tie": 30} and result["hows"] == {"agreed": 30, "same text": 30}
    assert result["measured"]["interval"]["value"] == 0.75 and result["verdict"]["difference"]["value"] == 0.5
    assert len(run.judges.of("fair")) == 60 and result["about"]["spent"]["calls"] == 61  # both orders, and the trial
    page = (run.places()[0] / "result.html").read_text()
    assert "is better than" in page and "because of" in page and "<script" not in page
    assert "because of" in (run.places()[0] / "result.md").read_text()
    assert run("fair") == 0
    assert len(run.judges.of("fair")) == 60
    run.good, run.poor = run.poor, run.good
    assert run("fair") == 0
    assert len(run.judges.of("fair")) == 60 and f"{run.good} is worse than {run.poor} by 50.0 points" in run.out


def test_who_stands_first_decides_nothing_and_is_counted(run: Run) -> None:
    assert run("first") == 0
    assert f"cannot tell {run.good} from {run.poor} (win rate): no difference on 60 rows" in run.out
    result = run.result()
    assert result["outcomes"] == {"tie": 60} and result["hows"] == {"first place": 30, "same text": 30}
    assert result["by_order"]["value"] == 1.0
    assert "the order decided 100.0 % (100.0..100.0) of the rows asked (30: the first place won both times): ties" in run.out


def test_an_order_that_decides_sometimes_is_told_with_its_rows(run: Run) -> None:
    assert run("wavering") == 0 and run("half-hearted") == 0
    (one,), (other,) = ([found for found in map(hows, run.places()) if kind in found] for kind in ("first place", "one tie"))
    asked = [n for n in range(NUM_ROWS) if 1 <= n % 10 <= 5]
    flipped = len([n for n in asked if n % 4 == 0])
    assert one == {"same text": 30, "agreed": 30 - flipped, "first place": flipped}
    assert other == {"same text": 30, "agreed": 30 - flipped, "one tie": flipped}
    assert "the order decided" in run.out and f"({flipped}: a tie in one order)" in run.out


def hows(place: Path) -> dict[str, int]:
    result = json.loads((place / "result.json").read_text())
    assert [sample["id"] for sample in result["samples"] if sample["why"] == "the order decided"]
    return dict(result["hows"])
