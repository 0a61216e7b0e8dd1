"""How far sources support answers: sentences, SummaC's aggregation against a second implementation, and `ftcore evaluate` with either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore.cli import main
from ftcore.errors import ModelError
from ftcore.evals import endpoint
from ftcore.evals.entailment import Entailment, sentences, support
from ftcore.evals.records import Records
from tests.answering import answering
from tests.classifiers import make_classifier
from tests.judges import Judges, judging

SOURCES = [
    "The shop opens at nine. The old cat sleeps on the mat! It is grey.",
    "A cat never sleeps.\nThe shop opens every day.",
    "The cat.",
]
ANSWERS = ["The shop opens at nine.", "A grey cat sleeps. The shop opens at ten. The mat?", ""]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("nli"))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]), ("It is 3.14.\n\nNext", ["It is 3.14.", "Next"]), ("", []), ("... !\n", []),
        ("\u5f00\u95e8\u3002\u5173\u95e8\uff01\u4e03\u70b9", ["\u5f00\u95e8\u3002", "\u5173\u95e8\uff01", "\u4e03\u70b9"]),
    ],
)  # fmt: skip
def test_sentences_end_where_they_end_in_english_and_chinese(text: str, pieces: list[str]) -> None:
    assert sentences(text) == pieces


def test_support_is_the_mean_over_the_answer_of_the_best_in_the_source() -> None:
    """By hand: 1 and 2 of 4 words in common at best, so (1 + 0.5) / 2."""

    def shared(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        words = [({*one.split()}, {*other.split()}) for one, other in pairs]
        return np.array([len(one & other) / len(other) for one, other in words])

    source = "a b c. d e f g."
    assert support([source], ["a b c. d e x y."], shared) == [pytest.approx((1 + 0.5) / 2)]
    assert support([source, "", source], ["", "a.", "!"], shared) == [0, 0, 0]


def test_a_classifiers_support_is_what_transformers_says_pair_by_pair(classifier: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(classifier), AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    expected = []
    for source, answer in zip(SOURCES, ANSWERS, strict=True):
        best: list[float] = []
        for hypothesis in (f"{piece}." for piece in answer.replace("?", ".").split(".") if piece.strip()):
            original = "The mat?" if "mat" in hypothesis else hypothesis.strip()
            premises = source.replace("!", "!|").replace(".", ".|").split("|")
            with torch.no_grad():
                chances = [model(**tokenizer(p.strip(), original, return_tensors="pt")).logits.softmax(-1)[0, 2].item()
                           for p in premises if p.strip()]  # fmt: skip
            best.append(max(chances))
        expected.append(sum(best) / len(best) if best else 0.0)
    found = support(SOURCES, ANSWERS, Entailment(str(classifier)))
    assert found == pytest.approx(expected, abs=1e-6) and len({round(value, 4) for value in found}) == 3


def test_a_model_that_tells_no_entailment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tells no entailment") as told:
        Entailment(str(make_classifier(tmp_path / "moods", ("sad", "glad"))))
    assert "got:    labels glad, sad" in str(told.value)
    with pytest.raises(ModelError, match="no such model folder"):
        Entailment("./nowhere")


@pytest.fixture
def judges() -> Iterator[Judges]:
    with judging() as server:
        yield server


def command(tmp_path: Path, num_rows: int = 12) -> list[str]:
    rows = [
        {"messages": [{"role": "user", "content": f"The shop opens at nine. What is {n} plus {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}."}]}
        for n in range(num_rows)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["evaluate", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--here"]


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["metrics"][-1] == "consistency"
    return list(results["lines"])


def test_evaluate_looks_at_consistency_by_a_model_and_compare_knows_it(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering() as server:
        systems = [f"{server.url}#good", f"{server.url}#poor"]
        asked = [*command(tmp_path), "--entailment", str(classifier), "--systems", *systems]
        assert main(asked) == 0
        records, model = Records(str(tmp_path / "out")), Entailment(str(classifier))
        by = json.loads((tmp_path / "out" / "results.json").read_text())["about"]["support"]
        for line in lines(tmp_path):
            questions, given = records.questions(), {row.id: row.text for row in records.answers(line["key"])}
            alone = [support([row.turns[0].content], [given[row.id]], model)[0] for row in questions]
            assert list(records.support(by, line["key"]).values()) == pytest.approx(alone, abs=1e-6)
            assert line["measured"]["consistency"]["interval"]["value"] == pytest.approx(np.mean(alone), abs=1e-6)
        assert f"consistency of answers with their sources: {by.partition('/')[2]}" in capsys.readouterr().out
        assert main(["compare", str(tmp_path / "out"), *systems, "--metrics", "consistency"]) == 0
        assert "(consistency)" in capsys.readouterr().out


def test_evaluate_looks_at_consistency_by_a_judge_within_its_limit(
    judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge says yes only to what is in the source or speaks of nine: to none of these answers."""
    with answering() as server:
        asked = [*command(tmp_path), "--systems", f"{server.url}#good", "--judge", f"{judges.url}#fair"]
        assert main([*asked, "--judge-limit", "5"]) == 75
        assert "stopped before all answers were judged" in capsys.readouterr().err and len(judges.bodies) == 5
        assert main(asked) == 0
        (line,) = lines(tmp_path)
        assert line["measured"]["consistency"]["interval"]["value"] == 0 and len(judges.bodies) == 13
        assert main(asked) == 0 and len(server.questions("good")) == 12
    assert len([body for body in judges.bodies if len(body["messages"]) == 2]) == 13  # nothing twice


def test_what_cannot_be_looked_at_is_refused(
    judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    with answering() as server:
        asked = [*command(tmp_path), "--systems", f"{server.url}#good"]
        for more, said in (
            (["--metrics", "consistency"], "remedy: name who looks: --entailment MODEL"),
            (["--metrics", "win_rate"], "remedy: ftcore compare OUT A B --judge SYSTEM"),
            (["--entailment", "x", "--judge", f"{judges.url}#fair"], "consistency is looked at once"),
            (["--judge", f"{judges.url}"], "an endpoint needs its model's name"),
            (["--judge", "http://127.0.0.1:9/v1#fair"], "this endpoint does not answer"),
        ):
            capsys.readouterr()
            assert main([*asked, *more]) != 0
            assert said in capsys.readouterr().err
        assert server.questions("good") == []
