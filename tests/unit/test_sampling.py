"""The sampler against transformers' own processors, and its draws against the distribution they come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftcore.engines.base import Sampling
from ftcore.sampling import Asked, filtered, penalised, sample, uniform

V = 50
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.3}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.4, "top_p": 0.7}, {"top_k": 1}, {"top_p": 0.01}, {"top_k": 500},
)  # fmt: skip


def theirs(logits: torch.Tensor, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """[V] probabilities by transformers' processors, in its order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_the_filtered_distribution_is_transformers_own(keys: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(20):
        logits = torch.randn(V, generator=generator) * (1 + case % 4)
        prompt, sampling = [1, 5, 7, 7, 20], Sampling(**keys)
        ours = penalised(logits.clone(), Asked(sampling, prompt, [], 0)) / sampling.temperature
        got = filtered(ours[None], [sampling])[0].softmax(-1)
        assert torch.allclose(got, theirs(logits, prompt, sampling), atol=1e-6)


def test_rows_of_different_settings_do_not_touch_each_other() -> None:
    logits = torch.randn(len(SETTINGS), V, generator=torch.Generator().manual_seed(1)) * 3
    rows = [Asked(Sampling(**keys), [1, 5], [7], 100 + i) for i, keys in enumerate(SETTINGS)]
    rows.append(Asked(Sampling(temperature=0), [1], [], 3))
    logits = torch.cat([logits, torch.randn(1, V)])
    before = logits.clone()
    together = [drawn.id for drawn in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0].id for i in range(len(rows))]
    assert together == alone
    assert together[-1] == int(logits[-1].argmax())
    assert torch.equal(before, logits)


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)) * 2
    want = logits[0].softmax(-1).double()
    num = 20_000
    ids = torch.tensor([drawn.id for drawn in sample(logits.expand(num, V), [Asked(Sampling(), [], [], seed) for seed in range(num)])])
    counts = torch.bincount(ids, minlength=V).double()
    chi_squared = float(((counts - num * want) ** 2 / (num * want)).sum())
    assert chi_squared < 100  # 49 degrees of freedom: 99.999 % of fair draws lie below


def test_a_stream_of_numbers_follows_from_the_seed_and_the_place_alone() -> None:
    assert uniform(5, 0) == uniform(5, 0) != uniform(5, 1) != uniform(6, 1)
    assert all(0 <= uniform(seed, 3) < 1 for seed in range(1000))


def test_presence_and_frequency_count_the_answer_alone_and_bias_is_added() -> None:
    logits = torch.zeros(V)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 7.0, 9: -100.0})
    got = penalised(logits.clone(), Asked(sampling, [1, 1, 1], [2, 2, 4], 0))
    want = torch.zeros(V)
    want[2], want[4], want[3], want[9] = -1.0, -0.75, 7.0, -100.0
    assert torch.equal(got, want)


def test_log_probabilities_are_the_models_own_before_temperature_and_filters() -> None:
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(3))
    rows = [Asked(Sampling(temperature=0.1, top_k=1, num_logprobs=3), [], [], 1), Asked(Sampling(), [], [], 2)]
    first, second = sample(logits, rows)
    logps = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(float(logps[0, first.id]))
    assert [token for token, _ in first.top] == logps[0].topk(3).indices.tolist()
    assert (second.logprob, second.top) == (None, ())
