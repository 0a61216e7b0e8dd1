"""Given: what one system made of one question, as it is written down: text, label or likelihood, and how long it took.

In: systems' answers. Out: records of a Parquet part; Answered rows for the metrics. Runs in: workers, the driver; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa

from ftcore.evals.answered import Answered, Answers
from ftcore.evals.asked import Asked

_TEXTS, _COUNTS = ("id", "text", "finish", "chosen", "scores", "error"), ("prompt_tokens", "completion_tokens", "num_tokens", "num_bytes")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS), *((name, pa.int32()) for name in _COUNTS),
        *((name, pa.float64()) for name in ("first_token_s", "seconds", "nll", "stereotyping", "toxicity")),
        *((name, pa.bool_()) for name in ("harmful", "refused")),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """An answer in words. `seconds`: from asking to the last token; `first_token_s`: to the first, None where that was not seen."""

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    error: str = ""
    """Why there is no answer; "" where there is one."""


@dataclass(frozen=True)
class Given(Said):
    """An answer to the question `id`, with what its task adds (see Answered)."""

    id: str = ""
    chosen: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    nll: float | None = None
    num_tokens: int = 0
    num_bytes: int = 0
    harmful: bool | None = None
    refused: bool | None = None
    stereotyping: float | None = None
    toxicity: float | None = None


def to_table(rows: Sequence[Given]) -> pa.Table:
    return pa.Table.from_pylist([{**asdict(row), "scores": json.dumps(row.scores)} for row in rows], SCHEMA)


def from_table(table: pa.Table) -> list[Given]:
    return [Given(**{**record, "scores": json.loads(record["scores"])}) for record in table.to_pylist()]


def answers_of(
    system: str, asked: Sequence[Asked], given: Sequence[Given], *, labelled: bool, support: Mapping[str, float | None] | None = None
) -> Answers:
    """In the order of the questions. `labelled`: the reference is a label. `support`: of rows by their ids, where somebody looked."""
    by_id, known = {row.id: row for row in given}, support or {}
    rows = [answered(question, by_id[question.id], labelled=labelled) for question in asked if question.id in by_id]
    return Answers(system, tuple(replace(row, support=known.get(row.id)) for row in rows))


def answered(question: Asked, given: Given, *, labelled: bool) -> Answered:
    """A row without an answer is answered wrongly: with nothing."""
    return Answered(
        question.id, given.text, (question.reference,), question.group, gold=question.reference.strip() if labelled else None,
        chosen=given.chosen if given.chosen is not None else "" if labelled else None, scores=given.scores, nll=given.nll,
        num_tokens=given.num_tokens, num_bytes=given.num_bytes, harmful=given.harmful, refused=given.refused,
        stereotyping=given.stereotyping, toxicity=given.toxicity,
    )  # fmt: skip
