"""Sampling: the next token of each row of a batch, from its own settings and its own random stream.

In: logits [n, V], each row's Sampling and tokens. Out: n token ids, with log-probabilities where asked. Runs in: engines.

Constraint, penalties, bias, temperature, top-k, top-p, min-p, in that order (as transformers applies them); log-probabilities are the
model's own, before any of it. The draw inverts the cumulative distribution at a number that follows from (seed, position) alone, so that a
row's text does not depend on its neighbours, on preemption or on a restart.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftcore.constraints import Walk
from ftcore.engines.base import Sampling


@dataclass(frozen=True)
class Drawn:
    """A chosen token."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Asked:
    """What one row asks of the sampler."""

    sampling: Sampling
    prompt: Sequence[int]
    answer: Sequence[int]
    seed: int
    walk: Walk | None = None


def sample(logits: Tensor, rows: Sequence[Asked]) -> list[Drawn]:
    """logits [n, V] -> one token a row."""
    logits = logits.float()
    own = logits
    touched = [i for i, row in enumerate(rows) if row.walk is not None or _is_penalised(row.sampling)]
    if touched:
        logits = logits.clone()
        for i in touched:
            logits[i] = penalised(_constrained(logits[i], rows[i].walk), rows[i])
    ids = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        some = rows if len(drawn) == len(rows) else [rows[i] for i in drawn]
        ids[drawn] = draw(logits if len(drawn) == len(rows) else logits[drawn], some)
    return _with_logprobs(own, ids.tolist(), rows)


def _constrained(logits: Tensor, walk: Walk | None) -> Tensor:
    """One row's logits [V], -inf where its constraint does not go on; as they are where the walk has a problem, which ends the row."""
    allowed = None if walk is None else walk.allowed()
    return logits if allowed is None else logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))


def draw(logits: Tensor, rows: Sequence[Asked]) -> Tensor:
    """[n] ids, drawn from the filtered distributions of rows with a temperature."""
    settings = [row.sampling for row in rows]
    device = logits.device
    temperatures = torch.tensor([max(each.temperature, 1e-5) for each in settings], device=device)
    logits = logits / temperatures[:, None]
    uniforms = torch.tensor([uniform(row.seed, len(row.answer)) for row in rows], dtype=torch.float64, device=device)
    if any(each.top_k or each.top_p < 1 or each.min_p for each in settings):
        logits = filtered(logits, settings)
    probabilities = logits.softmax(-1).double()
    cumulative = probabilities.cumsum(-1)
    found = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp_(max=logits.shape[-1] - 1)


def filtered(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Logits with -inf where top-k, top-p or min-p leave a token out; at least the most likely stays."""
    ordered, order = logits.sort(-1, descending=True)
    vocabulary = logits.shape[-1]
    device = logits.device
    ks = torch.tensor([each.top_k if 0 < each.top_k < vocabulary else vocabulary for each in settings], device=device)
    out = torch.arange(vocabulary, device=device)[None] >= ks[:, None]
    ordered = ordered.masked_fill(out, float("-inf"))
    probabilities = ordered.softmax(-1)
    tops = torch.tensor([each.top_p for each in settings], device=device)
    out |= (probabilities.cumsum(-1) - probabilities) >= tops[:, None]
    if any(each.min_p for each in settings):
        kept = ordered.masked_fill(out, float("-inf")).softmax(-1)
        least = torch.tensor([each.min_p for each in settings], device=device)
        out |= kept < least[:, None] * kept[:, :1]
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))


def penalised(logits: Tensor, row: Asked) -> Tensor:
    """One row's logits [V] after penalties and bias. Repetition counts the prompt, presence and frequency the answer alone."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.answer}), device=logits.device)
        value = logits[seen]
        logits[seen] = torch.where(value < 0, value * sampling.repetition_penalty, value / sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and row.answer:
        counts = Counter(row.answer)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    return logits


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that follows from the seed and the position in the answer."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _is_penalised(sampling: Sampling) -> bool:
    plain = sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty
    return not (plain and not sampling.logit_bias)


def _with_logprobs(logits: Tensor, ids: list[int], rows: Sequence[Asked]) -> list[Drawn]:
    asked = [i for i, row in enumerate(rows) if row.sampling.num_logprobs is not None]
    found: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = {}
    if asked:
        logps = logits[asked].log_softmax(-1)
        values, places = logps.topk(min(max(rows[i].sampling.num_logprobs or 0 for i in asked), logps.shape[-1]))
        for at, i in enumerate(asked):
            num = rows[i].sampling.num_logprobs or 0
            found[i] = (float(logps[at, ids[i]]), tuple(zip(places[at, :num].tolist(), values[at, :num].tolist(), strict=True)))
    return [Drawn(token, *found.get(i, (None, ()))) for i, token in enumerate(ids)]
