"""Metrics against values by hand; teacher forcing against a plain loop over a plain model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ftcore.data.chat import Chat
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import Conversation, Message, Origin
from ftcore.evals.intervals import Interval, closed_share, perplexity, ratio, ratio_difference
from ftcore.evals.predictors import Forecast, LanguageModel, answer_runs, batches, teacher_forced
from ftcore.evals.shots import prompted
from ftcore.evals.tasks.next_operation import judge
from ftcore.models import CausalModel, choose_layout, load_base
from ftcore.recipe import Data, Model, Source


def talk(*turns: str, user: str = "ada") -> Conversation:
    roles = ("user", "assistant")
    said = tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns))
    return Conversation((Message("system", f"user {user}"), *said), Origin("test", 1))


TALKS = [
    talk("open the report", "fox", "rename it", "lazy dog"),
    talk("name?", "My name is Ada"),
    talk("a", "b", "c", "d", "e", "quick brown fox"),
]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return Model(path=str(tiny_model_dir), dtype="fp32")


@pytest.fixture(scope="module")
def chat(model: Model) -> Chat:
    return Chat.open(load_tokenizer(model), data=Data(sources=(Source(path="unused"),)))


@pytest.fixture(scope="module", params=["auto", "sdpa"])
def causal(model: Model, request: pytest.FixtureRequest) -> CausalModel:
    base = load_base(model)
    return CausalModel(base, choose_layout(base, request.param, packs=False))


def test_a_ratio_is_sum_over_sum() -> None:
    assert ratio([1, 3], [2, 8]).value == pytest.approx(0.4)


def test_an_interval_of_equal_groups_has_no_width() -> None:
    assert ratio([1, 1, 1], [2, 2, 2]) == Interval(0.5, 0.5, 0.5)


def test_the_interval_is_the_normal_one_where_groups_are_many() -> None:
    """400 coin tosses: 0.5 +- 1.96 * 0.025."""
    tosses = [0, 1] * 200
    interval = ratio(tosses, [1] * 400)
    assert interval.low == pytest.approx(0.451, abs=0.006)
    assert interval.high == pytest.approx(0.549, abs=0.006)


def test_whole_groups_are_resampled() -> None:
    """The same answers in fewer, purer groups make a wider interval."""
    alone, together = ratio([0, 1] * 50, [1] * 100), ratio([0, 10] * 5, [10] * 10)
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    theirs = np.random.default_rng(0).integers(0, 10, 50).tolist()
    lead = ratio_difference([t + 1 for t in theirs], theirs, [10] * 50)
    assert (lead.value, lead.low, lead.high) == pytest.approx((0.1, 0.1, 0.1))


def test_perplexity_of_a_fair_coin_is_two() -> None:
    assert perplexity([3 * math.log(2), math.log(2)], [3, 1]).value == pytest.approx(2)


def test_no_groups_have_no_value() -> None:
    assert math.isnan(ratio([], []).value)


def test_intervals_that_touch_are_not_above() -> None:
    assert Interval(3, 2.5, 3.5).above(Interval(2, 1, 2.4))
    assert not Interval(3, 2.5, 3.5).above(Interval(2, 1, 2.5))


def test_the_closed_share_is_nan_without_a_way_to_go() -> None:
    assert closed_share(0.8, 0.2, 1.0) == pytest.approx(0.75)
    assert math.isnan(closed_share(0.8, 0.9, 0.9))


def test_answer_runs_are_found_at_both_ends() -> None:
    assert answer_runs(np.array([1, 1, 0, 1, 0, 0, 1])) == [(0, 2), (3, 4), (6, 7)]
    assert answer_runs(np.zeros(3)) == []


def test_batches_hold_every_example_once_within_the_budget() -> None:
    lengths = [5, 90, 30, 31, 200, 6]
    made = list(batches(lengths, budget=100))
    assert sorted(i for batch in made for i in batch) == list(range(6))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100 for batch in made)


def test_teacher_forcing_equals_a_plain_loop(causal: CausalModel, chat: Chat, model: Model) -> None:
    """Every conversation alone through the untouched model, answers found by their mask."""
    plain = load_base(model, dtype="fp32").eval()
    encoded = [chat.encode(conversation) for conversation in TALKS]
    for example, forecast in zip(encoded, teacher_forced(causal, encoded), strict=True):
        with torch.no_grad():
            logp = plain(torch.tensor(example.ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        runs = answer_runs(example.mask)
        right = [all(int(logp[t - 1].argmax()) == example.ids[t] for t in range(a, b)) for a, b in runs]
        nlls = [-sum(float(logp[t - 1, int(example.ids[t])]) for t in range(a, b)) for a, b in runs]
        assert forecast.hits.tolist() == right
        assert forecast.nlls == pytest.approx(nlls, abs=1e-4)
        assert forecast.tokens.tolist() == [b - a for a, b in runs]


def test_a_model_that_knows_the_answers_hits_them_all(causal: CausalModel, chat: Chat) -> None:
    """A head that is trained on one conversation until it knows it."""
    example = chat.encode(TALKS[0])
    lm, before = causal.lm, {name: tensor.clone() for name, tensor in causal.lm.state_dict().items()}
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.02)
    ids = torch.tensor(example.ids[None].astype(np.int64))
    extra = {"segment_lengths": (ids.shape[1],)} if causal.layout == "varlen" else {}
    for _ in range(60):
        logits = lm(ids, position_ids=torch.arange(ids.shape[1])[None], **extra).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    [forecast] = teacher_forced(causal, [example])
    lm.load_state_dict(before)
    assert forecast.hits.all()
    assert forecast.nlls.max() < 1


def test_examples_in_the_prompt_are_read_but_not_scored(causal: CausalModel, chat: Chat) -> None:
    with_examples = LanguageModel("k-shot", causal, chat, examples=TALKS[2:])
    [forecast] = with_examples.forecast(TALKS[:1])
    assert len(forecast.hits) == 2
    assert not np.allclose(forecast.nlls, LanguageModel("bare", causal, chat).forecast(TALKS[:1])[0].nlls)


def test_examples_of_the_same_user_are_preferred() -> None:
    mine, others = talk("x", "mine", user="ada"), talk("x", "others", user="ben")
    contents = [m.content for m in prompted(talk("y", "z", user="ada"), [others, mine]).messages]
    assert contents == ["user ada", "x", "mine", "y", "z"]


class Fixed:
    """Hits given by hand, two answers a conversation, three tokens each."""

    def __init__(self, name: str, hits: list[list[bool]], nll: float) -> None:
        self.name, self.hits, self.nll = name, hits, nll

    def forecast(self, conversations: list[Conversation]) -> list[Forecast]:
        return [Forecast(np.array(h), np.full(2, self.nll), np.full(2, 0 if math.isnan(self.nll) else 3)) for h in self.hits]


def test_the_table_adds_up() -> None:
    rivals = [Fixed("base", [[True, False], [False, False]], 3 * math.log(4)), Fixed("ngram", [[True, True], [True, False]], math.nan)]
    table = judge("two sessions", rivals, TALKS[:2])
    assert (table.num_sessions, table.num_operations) == (2, 4)
    assert table["base"].exact_match.value == pytest.approx(0.25)
    assert table["base"].perplexity.value == pytest.approx(4)
    assert math.isnan(table["ngram"].perplexity.value)
    assert table.lead("ngram", "base").value == pytest.approx(0.5)


def test_the_table_reads_in_three_forms() -> None:
    table = judge("t", [Fixed("a|b", [[True, False], [False, False]], math.nan)], TALKS[:2])
    assert "25.0" in table.text() and "-" in table.text()
    assert "| a\\|b | 25.0 |" in table.markdown()
    assert "perplexity" not in table.to_json()["lines"][0]
