"""The demo: its base, its history reader, and the whole of it from simulated rows to a promoted second version, small."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftcore.adapters import AdapterStore
from ftcore.demo.ceiling import CEILING, Ceiling
from ftcore.demo.history import write_history
from ftcore.demo.judging import BASE, NGRAM, OTHER, OWN, first_of_each, goals
from ftcore.demo.make_base import desktop_documents, document, make_model, make_tokenizer
from ftcore.demo.rows import conversation
from ftcore.demo.shell import shell_session
from ftcore.demo.simulator import sessions
from ftcore.demo.tenants import conversation_of, demo_teams
from ftcore.errors import DataError
from ftcore.evals.bench import Bench
from ftcore.evals.intervals import Interval
from ftcore.evals.tasks.next_operation import Line, Table, judge
from ftcore.recipe import Model
from pipelines.demo import main, parse, two_tenants
from serving.demo import main as serve

COMMITTED = Path(__file__).resolve().parents[2] / "ftcore/demo/base"
SMALL = ["--sessions", "12", "--held-out", "4"]
SMALL += [word for key in ("optim.max_steps=4", "optim.warmup=1", "resources.workers=1") for word in ("--set", key)]


# ---- the base


def test_the_committed_base_is_small_and_safe() -> None:
    weights = list(COMMITTED.glob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in weights) <= 10e6
    assert not [path.name for path in COMMITTED.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_the_committed_base_is_a_standard_architecture() -> None:
    model = AutoModelForCausalLM.from_pretrained(COMMITTED)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(COMMITTED))


def test_every_way_to_open_the_tokenizer_gives_the_same_ids() -> None:
    """transformers builds Qwen2's own pre-tokenizer for the folder; the file must say the same."""
    text = "download plan4.doc, + mutt 431 <|end|> déjà vu — 今天 don't  two  spaces\n"
    assert (
        AutoTokenizer.from_pretrained(COMMITTED)(text)["input_ids"]
        == Tokenizer.from_file(str(COMMITTED / "tokenizer.json")).encode(text).ids
    )


def test_the_tokenizer_can_write_anything_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED)
    text = "open /home/ada/Ünïcode—今天.txt 🎉"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_operation_takes_few_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED)
    operations = [odds.operation for session in sessions(demo_teams(0)[0], 20, 1) for odds in session.odds]
    assert np.mean([len(tokenizer(operation)["input_ids"]) for operation in operations]) <= 8


def test_the_base_copies_names_it_saw() -> None:
    """Wherever the base gets the verb right, it mostly gets the file right too: it has learnt to copy."""
    bench = Bench(Model(path=str(COMMITTED), dtype="fp32"), {})
    made = list(sessions(demo_teams(0)[0], 20, 1))
    table = judge("base", [bench.predictor(BASE), Ceiling(made)], [conversation_of(session) for session in made])
    assert table[BASE].exact_match.value > 0.12
    assert table[BASE].exact_match.value < table[CEILING].exact_match.value - 0.3


def test_the_chat_template_writes_what_the_corpus_holds() -> None:
    row = conversation(event.to_json() for event in next(sessions(demo_teams(0)[0], 1, 1)).events)
    assert AutoTokenizer.from_pretrained(COMMITTED).apply_chat_template(row["messages"], tokenize=False) == document(row)


def test_the_population_is_seeded() -> None:
    assert list(desktop_documents(2)) == list(desktop_documents(2))


def test_a_base_can_be_made_from_nothing() -> None:
    tokenizer = make_tokenizer((row["text"] for row in desktop_documents(20)), 500)
    model = make_model(tokenizer, hidden=32, layers=1)
    assert model.config.vocab_size == len(tokenizer) <= 500
    assert tokenizer.eos_token != tokenizer.pad_token


# ---- the sentences under the table


def line(name: str, value: float, half: float = 0.01) -> Line:
    nan = Interval(math.nan, math.nan, math.nan)
    return Line(name, Interval(value, value - half, value + half), nan)


def table_of(own: float, half: float = 0.01) -> Table:
    lines = (line(BASE, 0.3, half), line(NGRAM, 0.4), line(OTHER, 0.2, half), line(OWN, own, half), line(CEILING, 0.9))
    return Table("t", 1, 1, lines, {}, (1,))


@pytest.mark.parametrize(("own", "half", "met"), [(0.8, 0.01, True), (0.6, 0.01, False), (0.39, 0.01, False), (0.8, 0.3, False)])
def test_every_goal_must_be_met(own: float, half: float, met: bool) -> None:
    reached = goals(table_of(own, half), CEILING)
    assert all(goal.met for goal in reached) is met
    assert any("MISSED" in str(goal) for goal in reached) is not met


def test_every_user_gets_examples() -> None:
    made = [conversation_of(session) for session in sessions(demo_teams(0)[0], 8, 1)]
    assert len(first_of_each(made, 3)) == 6


# ---- a history of the user's own


def history(path: Path, count: int) -> Path:
    commands = [
        m["content"][2:] for i in range(count) for m in shell_session(np.random.default_rng(i))["messages"] if m["role"] == "assistant"
    ]
    path.write_text("\n".join(["export TOKEN=ghp_0123456789abcdefghijABCDEFGHIJ012345", *commands]) + "\n")
    return path


def test_a_history_is_masked_before_it_is_written(tmp_path: Path) -> None:
    mine = write_history(history(tmp_path / "history", 12), tmp_path / "out")
    written = mine.rows.read_text()
    assert "ghp_" not in written
    assert "export TOKEN" in written
    assert mine.num_redacted >= 1


def test_the_newest_fifth_of_a_history_is_held_out(tmp_path: Path) -> None:
    mine = write_history(history(tmp_path / "history", 12), tmp_path / "out")
    assert len(mine.test) == round(0.2 * (len(mine.train) + len(mine.test)))
    assert len(mine.rows.read_text().splitlines()) == len(mine.train)


@pytest.mark.parametrize("text", [None, "ls\n"])
def test_a_missing_or_short_history_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "history").write_text(text)
    with pytest.raises(DataError):
        write_history(tmp_path / "history", tmp_path / "out")


# ---- the whole


@pytest.mark.ray
def test_the_demo_runs_end_to_end_and_trains_nothing_twice(tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["--out", str(out), *SMALL]) == 0
    tables = json.loads((out / "table.json").read_text())
    assert [len(table["lines"]) for table in tables] == [6, 6, 3]
    assert len(AdapterStore(out / "adapters").list()) == 3
    assert len(list((out / "runs").glob("*/report.html"))) == 3
    capsys.readouterr()
    assert main(["--out", str(out), *SMALL]) == 0
    assert capsys.readouterr().out.count("already finished") == 3
    assert json.loads((out / "table.json").read_text()) == tables
    store = AdapterStore(out / "adapters")
    for ref in sorted(store.list("acme"), key=lambda ref: store.card(ref).created):
        store.promote(ref)  # so few steps need not make a better second version
    assert serve(["--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(told in shown for told in ("signed by", "after its promotion", "kept version 1")), shown


@pytest.mark.ray
def test_the_demo_takes_a_history_and_a_base_of_the_users_own(
    tmp_path: Path, local_ray: None, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--history",
        str(history(tmp_path / "history", 12)),
        "--model",
        str(tiny_model_dir),
        "--out",
        str(tmp_path / "demo"),
        *SMALL,
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (BASE, NGRAM, OWN))
    assert str(AdapterStore(tmp_path / "demo/adapters").resolve("me/shell")) in shown


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_goal_is_met_from_three_seeds(tmp_path: Path, local_ray: None, seed: int) -> None:
    started = time.monotonic()
    met = two_tenants(parse(["--out", str(tmp_path), "--seed", str(seed)]))
    print(f"seed {seed}: {time.monotonic() - started:.0f} s")
    assert met
