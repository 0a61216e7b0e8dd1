"""`ftcore compare --judge`: a judge asked in both orders about finished answers, over HTTP; what it may cost; when it is not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.evals import endpoint, judge
from ftcore.feedback.pairs import Pair, Pairs
from ftcore.storage import Folder
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
    linked = (run.folder / "results.html").read_text()
    assert f'href="judgements/{run.places()[0].name}/result.html"' in linked and linked.count("by 50.0 points (win rate)") == 1
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


def test_a_judge_of_nonsense_is_refused_before_rows_are_spent(run: Run) -> None:
    assert run("babble") == 3
    assert "this judge gives no verdict that can be read, not even on a trial question" in run.err
    assert "'I would rather not say, but 1 is a fine number.'" in run.err and "remedy: take a model that follows" in run.err
    assert len(run.judges.bodies) == 4 and run.judges.of("babble") == []  # as JSON and as a last line, each once more
    assert run("closed") == 3
    assert "this judge refuses a trial question" in run.err and "unknown field max_tokens" in run.err


def test_too_many_verdicts_that_cannot_be_read_are_no_verdict(run: Run) -> None:
    """mumble cannot be read where n % 5 is 0: on 12 of 60 rows, 6 of the 30 that it is asked about."""
    assert run("mumble") == 3
    assert f"cannot tell {run.good} from {run.poor}: the judge gave no verdict that can be read on" in run.out + run.err
    assert "wanted: at most 10 %" in run.err and run.result()["verdict"] is None and run.result()["measured"] is None
    assert run.result()["hows"]["missing"] and len(run.judges.of("mumble")) < 60 + 12  # it stops where the share cannot be reached any more
    assert run("mumble", "--unjudged", "0.2") == 0
    result = run.result()
    assert result["hows"] == {"agreed": 24, "same text": 30, "unread": 6} and result["unjudged_share"] == 0.2
    assert "6 rows are unjudged (20.0 % of the rows asked): no verdict could be read, asked twice" in run.out
    assert f"{run.good} is better than" in run.out.splitlines()[-3] and "on 54 rows" in run.out
    requests = [json.dumps(body) for body in run.judges.of("mumble")]
    assert len(requests) == 60 + 12 == len(set(requests))  # the unread once more with a reminder, and nothing twice


def test_a_verdict_that_is_read_the_second_time_counts(run: Run) -> None:
    assert run("slow-witted") == 0
    assert run.result()["outcomes"] == {"ours": 30, "tie": 30} and run.result()["about"]["spent"]["calls"] == 2 * 61
    again = next(body["messages"] for body in run.judges.of("slow-witted") if len(body["messages"]) == 4)
    assert [turn["role"] for turn in again] == ["system", "user", "assistant", "user"] and "could not be read" in again[3]["content"]


def test_a_judge_that_takes_no_schema_is_read_from_its_last_line(run: Run) -> None:
    assert run("prose") == 0
    assert run.result()["outcomes"] == {"ours": 30, "tie": 30}
    assert all("response_format" not in body for body in run.judges.of("prose")) and len(run.judges.of("prose")) == 60


def test_a_judge_that_is_not_there_or_says_nothing_is_told_before_rows_are_spent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run.judges.url
    run.judges.url = "http://127.0.0.1:9/v1"
    assert run("fair") == 1
    assert "this endpoint does not answer" in run.err and "where:  http://127.0.0.1:9/v1" in run.err and "remedy:" in run.err
    run.judges.url, run.judges.silent_s = told, 0.5
    monkeypatch.setattr(judge, "TRIAL_TIMEOUT_S", 0.1)
    assert run("fair") == 1
    assert "this endpoint does not answer" in run.err and "timed out" in run.err and run.judges.of("fair") == []


def test_a_busy_judge_is_waited_for_and_one_that_breaks_down_costs_what_it_answered(run: Run) -> None:
    run.judges.busy = 5
    run.judges.gone_after = 40
    assert run("fair", "--at-once", "4") == 1
    assert "this endpoint fails" in run.err and "500" in run.err
    run.judges.gone_after = -1
    assert run("fair") == 0
    assert len(run.judges.of("fair")) == 60 and run.result()["about"]["spent"]["calls"] == 61


@pytest.mark.parametrize(("limit", "calls"), [(["20"], 20), (["tokens=6000"], 54), (["money=0.009"], 36)])
def test_a_limit_is_met_before_it_is_passed_and_a_higher_one_goes_on(run: Run, limit: list[str], calls: int) -> None:
    """A call takes 110 tokens; at 1 and 15 a million, 0.00025. A question of n bytes counts as n tokens before it is asked."""
    prices = ["--judge-prices", "1", "15", "--judge-tokens", "20"]
    assert run("fair", "--judge-limit", *limit, *prices) == 75
    assert "the next question could pass the limit" in run.err and "a higher --judge-limit: the same command goes on" in run.err
    result = run.result()
    spent = result["about"]["spent"]
    assert (
        spent["calls"] == len(run.judges.bodies)
        and 10 < spent["calls"] <= calls
        and "rows are not judged yet, the others are a sample" in run.out
    )
    assert result["verdict"] is None or result["verdict"]["num_rows"] < 60
    assert run("fair", "--judge-limit", "500", *prices) == 0
    assert len(run.judges.bodies) == 61 and run.result()["outcomes"] == {"ours": 30, "tie": 30}
    assert f"cost: 61 calls, {61 * 110:,} tokens, {61 * 0.00025:.4f} in money" in run.out


def test_replies_that_are_not_counted_are_taken_at_their_most(run: Run) -> None:
    run.judges.counts = False
    assert run("fair") == 0
    spent = run.result()["about"]["spent"]
    assert spent["uncounted"] == 61 and spent["completion_tokens"] == 61 * 512
    assert "61 replies were not counted by the endpoint: taken at their most" in run.out


def test_the_key_comes_from_the_environment_and_stays_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "k-123")
    assert run("fair", "--key-variable", "SECRET_OF_MINE") == 0
    assert run.judges.keys == {"Bearer k-123"}
    assert all(b"k-123" not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())


def test_people_are_compared_with_the_judge(run: Run, tmp_path: Path) -> None:
    """Of 30 rows that good wins, people say so of 20, and 5 times they prefer poor."""
    rows, wrong = [], [n for n in range(NUM_ROWS) if 1 <= n % 10 <= 5]
    for at, n in enumerate(wrong[:25]):
        chosen, rejected = (f"It is {2 * n}.", "No idea.") if at < 20 else ("No idea.", f"It is {2 * n}.")
        rows.append({"prompt": f"What is {n} plus {n}?", "chosen": chosen, "rejected": rejected})
    rows.append({"prompt": "What is 1 plus 1?", "chosen": "It is 2.", "rejected": "something else"})
    people = tmp_path / "people.jsonl"
    people.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("fair", "--human", str(people)) == 0
    found = run.result()["people"]
    assert (found["num_labels"], found["num_rows"], found["share"]["value"]) == (25, 25, 0.8)
    assert found["kappa"]["value"] == 0  # the judge says one thing only: as much as chance would agree
    assert "agreement with people: 80.0 %" in run.out and "Cohen's kappa 0.00" in run.out
    people.write_text(json.dumps({"prompt": "What?", "chosen": "a", "rejected": "b"}) + "\n")
    assert run("fair", "--human", str(people)) == 3
    assert "nobody was asked about these answers" in run.err
    people.write_text(json.dumps({"prompt": "What?", "chosen": "a"}) + "\n")
    assert run("fair", "--human", str(people)) == 3
    assert "this is no preference: missing key" in run.err and "people.jsonl, row 1" in run.err


def test_people_who_say_tie_are_counted_with_the_judges_ties(run: Run, tmp_path: Path) -> None:
    """`fair` prefers good on 30 rows. Ann says so of 10 of these and `tie` of 5; Bob says `tie` of one, and skips one."""
    wrong = [n for n in range(NUM_ROWS) if 1 <= n % 10 <= 5]
    pairs = [Pair(({"role": "user", "content": f"What is {n} plus {n}?"},), "No idea.", f"It is {2 * n}.") for n in wrong[:15]]
    labels = Folder(str(tmp_path / "labels"))
    Pairs(tuple(pairs), {}).write(labels)
    said = {"ann": ["b"] * 10 + ["tie"] * 5, "bob": ["tie", "skip"]}
    for rater, choices in said.items():
        lines = [{"pair": pair.id, "rater": rater, "choice": choice, "shown": "ab"} for pair, choice in zip(pairs, choices, strict=False)]
        labels.write(f"raters/{rater}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    assert run("fair", "--human", str(tmp_path / "labels")) == 0
    found = run.result()
    assert (found["people"]["num_labels"], found["people"]["num_ties"], found["people"]["num_rows"]) == (16, 6, 15)
    assert found["people"]["share"]["value"] == 10 / 16 and found["people_decided"]["share"]["value"] == 1.0
    assert "16 labels, 6 of them ties, of 15 rows" in run.out and "where both preferred one: 100.0 %" in run.out


def test_a_rubric_of_ones_own_is_what_the_judge_reads_and_makes_another_judgement(run: Run, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Prefer the shorter answer.")
    assert run("fair") == 0 and run("fair", "--rubric", str(rubric)) == 0
    told = {body["messages"][0]["content"] for body in run.judges.bodies}
    assert any("Prefer the shorter answer." in text and "Is it right?" not in text for text in told)
    first, second = (json.loads((place / "result.json").read_text())["about"] for place in run.places())
    assert first["rubric_digest"] != second["rubric_digest"] and {first["rubric"], second["rubric"]} == {"built in", str(rubric)}
    rubric.write_text("")
    assert run("fair", "--rubric", str(rubric)) == 3
    assert "this is no rubric" in run.err


def test_what_cannot_be_judged_is_refused(run: Run) -> None:
    assert run("fair", "--judge-limit", "rows=5") == 2
    assert "this is no limit" in run.err and "rows=5" in run.err
    assert run("fair", "--judge-limit", "money=5") == 2
    assert "money is counted by prices" in run.err
    assert run("fair", "--unjudged", "1") == 2
    run.judges.url = "base"
    assert run("fair") == 2
    assert "--judge" in run.err and run.judges.bodies == []


def test_answers_of_two_folders_are_judged_by_their_questions(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "other")
    assert main(["compare", str(run.folder), str(tmp_path / "other"), run.good, run.poor, "--judge", f"{run.judges.url}#fair"]) == 0
    assert f"{run.good} is better than {run.poor} by 50.0 points (win rate)" in run.capsys.readouterr().out
    assert not (tmp_path / "other" / "judgements").exists()


def test_what_a_judge_says_is_shown_as_what_it_is(run: Run) -> None:
    assert run("hostile") == 0
    (place,) = run.places()
    page, text = (place / "result.html").read_text(), (place / "result.md").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "\\<script" in text and "\x1b" not in page + text + run.out


def test_a_local_model_judges_too(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A tiny model with random weights cannot judge: it is asked, and refused for what it says. One too small for the question is, too."""
    command = ["compare", str(run.folder), run.good, run.poor, "--judge-tokens", "8", "--judge"]
    assert main([*command, "base", "--base", str(tiny_model_dir)]) == 3
    assert "this judge refuses a trial question" in (said := run.capsys.readouterr().err) and "does not fit the context" in said
    larger = shutil.copytree(tiny_model_dir, tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    assert main([*command, str(larger)]) == 3
    assert "this judge gives no verdict that can be read" in run.capsys.readouterr().err


def test_the_readme_shows_what_a_judge_comes_to(run: Run) -> None:
    assert run("wavering", "--judge-limit", "200", "--judge-prices", "0.15", "0.60") == 0
    page = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    shown = page.split("```text\njudged by")[1].split("```")[0]
    said = run.out.replace(run.judges.url, "http://judge/v1").replace(run.good.partition("#")[0], "http://systems/v1")
    lines = f"judged by{shown}".splitlines()
    assert len(lines) == 6 and [line for line in lines if line not in said.splitlines()] == []
