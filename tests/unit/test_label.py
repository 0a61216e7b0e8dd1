"""`ftcore label`: what a rater sees and does not, what a key means, what a kill costs, what training reads of it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.data.formats.base import recognise, to_item
from ftcore.data.types import Origin, Preference, Row
from ftcore.feedback.desk import Desk, order
from ftcore.feedback.judgements import RaterFile, read_judgements
from ftcore.feedback.pairs import file_pairs
from ftcore.feedback.terminal import text_of
from pipelines import evaluate
from tests.answering import answering


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"What is {number} plus {number}?", "a": f"It is {2 * number}.", "b": f"Fish {number}.", **more}


def label(monkeypatch: pytest.MonkeyPatch, keys: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
    return main(["label", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", [pair(n, a_from="acme/support", b_from="base") for n in range(6)])


def preferred_by(rater: str, pairs: str, answer: str) -> str:
    """The keys with which this rater prefers answer a (or b) of every pair."""
    return " ".join("a" if (order(one.id, rater) == "ab") == (answer == "a") else "b" for one in file_pairs(pairs).pairs)


def test_preferences_are_of_the_answers_whatever_stood_first_and_training_reads_them(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "labels"
    keys = preferred_by("ann", pairs, "a")
    assert set(keys.split()) == {"a", "b"}
    assert label(monkeypatch, keys, pairs, "--out", str(out), "--rater", "ann") == 0
    rows = lines(out / "preferences.jsonl")
    assert [(row["chosen_from"], row["rejected_from"]) for row in rows] == [("acme/support", "base")] * 6
    read = [Row(row, Origin("p", number)) for number, row in enumerate(rows, 1)]
    assert recognise(read, Preference)[0] == "preference"
    item = to_item(read[2], "preference")
    assert isinstance(item, Preference) and item.prompt[-1].content == "What is 2 plus 2?"
    assert (item.chosen.content, item.rejected.content) == ("It is 4.", "Fish 2.")


def test_what_two_systems_of_an_evaluation_answered_is_judged_without_those_that_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": pair(n)["prompt"]}, {"role": "assistant", "content": "?"}]} for n in range(20)]
    results, out = str(tmp_path / "results"), tmp_path / "labels"
    with answering() as server:
        good, poor = f"{server.url}#good", f"{server.url}#poor"
        evaluate.main(["--rows", write(tmp_path / "rows.jsonl", rows), "--systems", good, poor, "--out", results, "--here"])
    assert label(monkeypatch, "t", results, good[:-1], poor, "--out", str(out)) == 2
    assert f"did you mean `{good}`?" in capsys.readouterr().err
    assert label(monkeypatch, " ".join("a" * 10), results, good, poor, "--out", str(out), "--rater", "ann") == 0
    said = capsys.readouterr().out
    assert "10 rows left out: both answers are the same" in said and "[10 of 10]" in said and server.url not in said
    assert {row["chosen_from"] for row in lines(out / "preferences.jsonl")} == {good, poor}


def test_a_conversation_with_several_turns_stays_one_that_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And?"}]
    pairs = write(tmp_path / "p.jsonl", [pair(1, prompt=turns)])
    label(monkeypatch, preferred_by("ann", pairs, "b"), pairs, "--out", str(tmp_path / "out"), "--rater", "ann")
    item = to_item(Row(lines(tmp_path / "out" / "preferences.jsonl")[0], Origin("p", 1)), "preference")
    assert isinstance(item, Preference) and [turn.role for turn in item.prompt] == ["system", "user"]
    assert item.chosen.content == "Fish 1."


def test_no_system_is_named_and_control_characters_are_written_out(tmp_path: Path) -> None:
    found = file_pairs(write(tmp_path / "p.jsonl", [pair(1, a="\x1b[31mred\u202e", a_from="acme/support", b_from="base")]))
    file = RaterFile(tmp_path, "ann")
    file.open()
    shown = Desk(found.pairs, file, scored=False).current
    file.close()
    assert shown is not None
    text = text_of(shown, scored=False)
    assert "acme" not in text and "base" not in text and "\x1b" not in text and "\u202e" not in text and "\\x1b[31mred" in text


def test_which_answer_stands_first_is_drawn_by_row_and_by_rater() -> None:
    drawn = [[order(f"{n:016x}", rater) for n in range(400)] for rater in ("ann", "bob")]
    assert all(160 < each.count("ab") < 240 for each in drawn)
    assert 160 < sum(one == other for one, other in zip(*drawn, strict=True)) < 240


def test_a_killed_sitting_loses_nothing_and_goes_on(pairs: str, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    command = [sys.executable, "-m", "ftcore.cli", "label", pairs, "--out", str(out), "--rater", "ann"]
    sitting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert sitting.stdin and sitting.stdout
    sitting.stdin.write("a\nb\n")
    sitting.stdin.flush()
    while "[3 of 6]" not in sitting.stdout.readline():
        pass
    sitting.send_signal(signal.SIGKILL)
    sitting.wait()
    sitting.stdin.close()
    sitting.stdout.close()
    path = out / "raters" / "ann.jsonl"
    assert len(lines(path)) == 2
    path.write_bytes(path.read_bytes() + b'{"pair": "torn')
    done = subprocess.run([*command[:4], *command[5:]], input="t\nq\n", capture_output=True, text=True, check=True)
    assert "[3 of 6]" in done.stdout and "3 of 6 pairs judged by ann, 1 of them now" in done.stdout
    assert [line["choice"] for line in lines(path)][2:] == ["tie"]


def test_a_second_sitting_of_one_rater_is_refused_and_another_rater_is_not(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    file = RaterFile(out, "ann")
    file.open()
    assert label(monkeypatch, "a", pairs, "--out", str(out), "--rater", "ann") == 2
    assert "this rater is labelling already" in capsys.readouterr().err
    assert label(monkeypatch, "a", "--out", str(out), "--rater", "bob") == 0
    file.close()


def test_undo_takes_back_the_last_one_also_of_an_earlier_sitting(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "labels"
    label(monkeypatch, "t t s q", pairs, "--out", str(out), "--rater", "ann")
    label(monkeypatch, "u u a q", "--out", str(out), "--rater", "ann")
    kept = read_judgements([str(out)])["ann"]
    assert [one.choice == "tie" for one in kept] == [True, False] and kept[1].choice in ("a", "b")
    label(monkeypatch, "u u u q", "--out", str(out), "--rater", "ann")
    assert read_judgements([str(out)]) == {}


def test_raters_who_differ_make_no_row_and_a_majority_does(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    for rater, answer in (("ann", "a"), ("bob", "b")):
        label(monkeypatch, preferred_by(rater, pairs, answer), pairs, "--out", str(out), "--rater", rater)
    assert lines(out / "preferences.jsonl") == []
    assert "6 pairs without preference: the raters differ" in capsys.readouterr().out
    label(monkeypatch, preferred_by("cyd", pairs, "b"), pairs, "--out", str(out), "--rater", "cyd")
    rows = lines(out / "preferences.jsonl")
    assert len(rows) == 6 and rows[0]["votes"] == {"chosen": 2, "rejected": 1, "tie": 0} and rows[0]["raters"] == ["ann", "bob", "cyd"]
    capsys.readouterr()
    assert main(["label", "--agreement", str(out)]) == 0
    told = capsys.readouterr().out
    assert "ann (6), bob (6), cyd (6)" in told and "Fleiss' kappa" in told
    assert main(["label", "--agreement", str(out / "raters" / "bob.jsonl"), str(out / "raters" / "cyd.jsonl")]) == 0
    assert "raw agreement                  1.000" in capsys.readouterr().out


def test_scores_are_of_the_answers_whatever_stood_first(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    for rater, worst in (("ann", 2), ("bob", 1)):
        keys = ["".join(("5", str(worst))[:: 1 if order(one.id, rater) == "ab" else -1]) for one in file_pairs(pairs).pairs]
        assert label(monkeypatch, f"9 60 {' '.join(keys)}", pairs, "--out", str(out), "--rater", rater, "--scores") == 0
    rows = lines(out / "preferences.jsonl")
    assert len(rows) == 6 and rows[0]["chosen_from"] == "acme/support" and rows[0]["scores"] == {"chosen": 5, "rejected": 1.5}
    assert main(["label", "--agreement", str(out)]) == 0
    assert "Krippendorff's alpha, ordinal" in capsys.readouterr().out
    assert label(monkeypatch, "a", pairs, "--out", str(out), "--rater", "cyd") == 2
    assert "other kind" in capsys.readouterr().err


def test_what_teaches_nothing_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(1), pair(1), pair(2, a="same", b="same"), pair(3, b=" ")]
    assert label(monkeypatch, "a", write(tmp_path / "p.jsonl", rows), "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    for reason in (
        "1 rows left out: both answers are the same",
        "1 rows left out: an answer is empty",
        "1 rows left out: the pair is there",
    ):
        assert reason in said
    assert "[1 of 1]" in said


@pytest.mark.parametrize(
    ("row", "told"),
    [({"prompt": "x", "a": "y"}, "no pair of answers"), ({"prompt": "", "a": "y", "b": "z"}, "no pair"),
     ({"prompt": [{"role": "user"}], "a": "y", "b": "z"}, "no pair"), ({"prompt": "x", "a": "y", "b": "y"}, "no pair to judge")],
)  # fmt: skip
def test_a_file_that_holds_no_pairs_is_refused_with_its_place(
    row: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "p.jsonl", [row])
    assert label(monkeypatch, "a", path, "--out", str(tmp_path / "out")) == 3
    said = capsys.readouterr().err
    assert told in said and path in said


def test_other_pairs_do_not_mix_with_those_of_a_folder(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert label(monkeypatch, "q", pairs, "--out", out) == 0
    assert label(monkeypatch, "q", write(tmp_path / "other.jsonl", [pair(9)]), "--out", out) == 2
    assert "this folder holds other labels" in capsys.readouterr().err
    assert label(monkeypatch, "q", "--out", str(tmp_path / "nothing")) == 2
    assert "which answers are to be judged?" in capsys.readouterr().err


def test_one_key_is_enough_in_a_terminal_and_an_arrow_key_judges_nothing(pairs: str, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "ftcore.cli", "label", pairs, "--out", str(tmp_path / "out"), "--rater", "ann"]
    sitting = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen = ""

    def wait_for(text: str) -> None:
        nonlocal screen
        deadline = time.monotonic() + 120
        while text not in screen:
            assert time.monotonic() < deadline, screen
            screen += os.read(leader, 4096).decode()
        screen = screen.partition(text)[2]

    wait_for("q: quit")
    for keys, answer in ((b"\x1b[A", "no such key"), (b"a", "[2 of 6]"), (b"t", "[3 of 6]"), (b"u", "[2 of 6]"), (b"q", "1 of 6 pairs")):
        os.write(leader, keys)
        wait_for(answer)
    assert sitting.wait(120) == 0
    os.close(leader)


def test_labelling_loads_no_torch_and_no_ray(pairs: str, tmp_path: Path) -> None:
    code = (
        f"import sys; from ftcore.cli import main; main(['label', {pairs!r}, '--out', {str(tmp_path / 'o')!r}]);"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], input="q\n", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
