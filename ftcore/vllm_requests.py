"""Requests in vLLM's words, and the second walk through a constraint that goes beside vLLM's own.

In: a request, tokens as vLLM makes them. Out: SamplingParams; why a constrained answer may not go on. Runs in: processes that opened a vllm
engine.

vLLM follows a constraint with the same library, in its own process, but within looser bounds, without a clock, and a grammar that became
too complex ends its answer there as if it were complete. So every answer's own Walk goes along here, a step behind, and has the last word.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from ftcore.constraints import Walk
from ftcore.engines.base import Request, Token
from ftcore.errors import ConfigError

BACKEND = "guidance"
"""vLLM's name of the library that ours is."""
LEAST_TOP_P = 1e-6
"""vLLM wants more than 0; the most likely token stays in either way."""


class CheckedParams(SamplingParams):
    """vLLM would compile a grammar on the event loop, to see whether it can; ours was compiled already, in a thread."""

    def _validate_structured_outputs(self, *_: Any) -> None:
        if self.structured_outputs is not None:
            self.structured_outputs._backend = BACKEND


def params_of(request: Request, room: int, eos: int | None) -> SamplingParams:
    """`eos`: the token with which vLLM ends what is complete. Raises ConfigError for what vLLM does not have."""
    sampling, grammar = request.sampling, request.constraint
    if grammar is not None and sampling.num_logprobs is not None:
        raise ConfigError(
            "this engine gives no log-probabilities of constrained answers: vLLM's are of what the constraint leaves, not the model's own",
            where="num_logprobs", got=str(sampling.num_logprobs), wanted="none",
        )  # fmt: skip
    stops = request.stop_ids if grammar is None or eos is None else request.stop_ids | {eos}
    try:
        return CheckedParams(
            temperature=sampling.temperature, top_p=max(sampling.top_p, LEAST_TOP_P), top_k=sampling.top_k or -1, min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty, presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty, logit_bias=dict(sampling.logit_bias) or None,
            seed=None if sampling.seed is None else sampling.seed % 2**63, logprobs=sampling.num_logprobs,
            max_tokens=min(request.max_tokens, room), stop_token_ids=sorted(stops), ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar.constraint.grammar(stops - {eos})),
        )  # fmt: skip
    except VLLMValidationError as error:
        raise ConfigError("vLLM does not have this sampling", where="sampling", got=str(error)[:300]) from error


async def followed(token: Token, walk: Walk) -> Token:
    """The token, or the end of the answer with the reason why it may not go on so, or stop here."""
    problem = ""
    if token.finish == "stop":
        problem = "" if walk.is_complete else walk.problem or "vLLM could not follow the constraint to its end"
    elif token.finish != "abort":
        problem = await asyncio.to_thread(_take, walk, token.id)
    return replace(token, id=-1, finish="abort", problem=problem) if problem else token


def _take(walk: Walk, token: int) -> str:
    """What tokens may come is asked for as well: that is the slow part, and where a grammar becomes too complex."""
    if walk.allowed() is not None:
        walk.accept(token)
    return walk.problem
