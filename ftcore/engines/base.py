"""Engine: who speaks. The section that chooses one, and what a running engine is asked and answers.

In: a base, adapter folders, requests of token ids. Out: a stream of tokens, each with the digest of the adapter whose weights computed it.
Runs in: serving replicas, `ftcore chat`, evaluation, rollouts; no torch until `open()`.

An engine knows digests, never names or tenants: what a name means is the caller's to decide, once, before it asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftcore.errors import ConfigError, ModelError
from ftcore.registry import Registry
from ftcore.section import Choice, chosen

if TYPE_CHECKING:
    from ftcore.constraints import Grammar

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are the model's own distribution."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """The same text for the same request, whatever else is in the batch; None draws a seed."""
    num_logprobs: int | None = None
    """How many of the most likely tokens come with each token; 0 gives the token's own alone, None gives none."""


@dataclass(frozen=True)
class Request:
    """One answer to make."""

    id: str
    prompt: tuple[int, ...]
    adapter: str = ""
    """Digest of a loaded adapter; empty for the bare base."""
    max_tokens: int = 16
    stop_ids: frozenset[int] = frozenset()
    """The answer ends before any of these."""
    sampling: Sampling = Sampling()
    salt: str = ""
    """Keys and values are reused only between requests of one salt (a tenant)."""
    constraint: Grammar | None = None
    """What the answer is held to. It ends (`stop`) where the grammar is complete."""


@dataclass(frozen=True)
class Token:
    """One step of an answer."""

    id: int
    adapter: str
    """Digest held by the slot that computed this token; empty for the bare base."""
    logprob: float | None = None
    """Natural logarithm, of the model's distribution before temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
    """Set on the last one. After `stop` the id is the stop token, which is no part of the answer; after `abort` it is -1."""
    problem: str = ""
    """After `abort`: what in the request itself kept the answer from going on; empty when it was not the request."""


@dataclass(frozen=True)
class Stats:
    """What an engine holds and has done."""

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    """Generated, since the start."""
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    adapters: tuple[str, ...] = ()
    adapter_bytes: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    num_admitted: int = 0
    """Requests that were let in, since the start."""
    waited_s: float = 0.0
    """What they waited before that, added up."""
    num_preempted: int = 0
    """Times that one stepped back for another owner's, to go on later."""


class EngineEnded(ModelError):
    """The engine is gone, or gave an answer up: nothing is wrong with what was asked, and another engine may answer it."""


class LiveEngine(ABC):
    """A running engine. Every method may be called from the event loop that opened it, and none blocks that loop."""

    computes: ClassVar[bool] = True
    """Whether its answers come from weights, so that probes and constraints can be held to it."""
    gives_logprobs: ClassVar[bool] = False
    """Whether `next_logits` gives log-probabilities: logits less one number for each prompt, which no answer depends on."""
    max_context: int
    """Prompt and answer together, in tokens."""
    vocabulary: int
    """Tokens are 0 to vocabulary - 1."""
    precision: str
    """What it computes in ("fp32", "bf16", ...), as probes name it."""

    @abstractmethod
    async def load_adapter(self, digest: str, folder: Path) -> None:
        """Makes a digest known; of several calls at once for one digest, one loads. Raises ModelError or IntegrityError with the reason."""

    @abstractmethod
    async def unload_adapter(self, digest: str) -> None:
        """Forgets a digest and every key and value computed with it, once the requests that use it have ended."""

    def check(self, request: Request) -> None:
        """Raises ConfigError for what this engine could not answer, whatever it holds."""
        check_request(request, self.max_context, self.vocabulary)

    @abstractmethod
    def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Streams the answer; closing the iterator aborts. Raises ConfigError for what cannot be asked, before the first token."""

    @abstractmethod
    async def abort(self, request_id: str) -> None:
        """Ends a request within a step and frees what it held; unknown ids are passed over."""

    @abstractmethod
    async def next_logits(self, prompts: Sequence[Sequence[int]], digest: str = "") -> Sequence[Any]:
        """Logits after each prompt, P arrays [V] in fp32, through the very path that answers: what probes are compared with."""

    def embed(self, prompts: Sequence[Sequence[int]], digest: str = "", salt: str = "") -> AsyncGenerator[Any, None]:
        """Each prompt's last token's final hidden state, of length 1, in order: arrays [H] in fp32. Closing the iterator aborts.

        `salt`: whose prompts they are, as in a Request. Raises ConfigError where none are given.
        """
        raise ConfigError("this engine gives no embeddings", where="engine", wanted="torch")

    @abstractmethod
    def stats(self) -> Stats: ...

    @abstractmethod
    async def health(self) -> None:
        """Returns within a step of a live engine; raises what ended a dead one."""

    @abstractmethod
    async def close(self) -> None: ...


class Engine(Choice):
    """Section of an engine: what it runs and how much it may hold."""

    max_batch: int = Field(16, ge=1)
    """Answers made at once."""
    max_context: int = Field(2048, ge=16)
    """Longest prompt and answer together, in tokens; no longer than the base allows."""

    @abstractmethod
    async def open(self, base: str) -> LiveEngine:
        """Loads the base (a folder or hub name) and starts."""


ENGINES: Registry[type[Engine]] = Registry("engine", "ftcore.engines")
EngineChoice = chosen(Engine, ENGINES, default="torch")


def check_request(request: Request, max_context: int, vocabulary: int) -> None:
    """Raises ConfigError for a request that no engine could answer."""
    check_prompt(request.prompt, max_context - 1, vocabulary)
    if request.max_tokens < 1:
        raise ConfigError("an answer has at least one token", where="max_tokens", got=str(request.max_tokens), wanted="1 or more")
    sampling = request.sampling
    bounds = {
        "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 2**31), "min_p": (0, 1), "repetition_penalty": (1e-3, 1e3),
        "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        if not least <= getattr(sampling, name) <= most:
            raise ConfigError(f"{name} is out of bounds", where=name, got=str(getattr(sampling, name)), wanted=f"{least} to {most}")
    if request.constraint is not None and not request.stop_ids:
        raise ConfigError("a constrained answer ends at a stop token", where="stop_ids", got="none", wanted="at least one")
    if sampling.num_logprobs is not None and sampling.num_logprobs < 0:
        raise ConfigError("there is no such number of log-probabilities", where="num_logprobs", got=str(sampling.num_logprobs))
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            raise ConfigError("logit_bias names a token that this base does not have", where="logit_bias", wanted=f"0 to {vocabulary - 1}")
        if not -1000 <= bias <= 1000:
            raise ConfigError("logit_bias is out of bounds", where="logit_bias", got=str(bias), wanted="-1000 to 1000")


def check_prompt(prompt: Sequence[int], longest: int, vocabulary: int) -> None:
    """Raises ConfigError for a prompt that is empty, too long, or not of this base's tokens."""
    if not prompt:
        raise ConfigError("the prompt is empty", where="prompt", wanted="at least one token")
    if len(prompt) > longest:
        raise ConfigError("the prompt does not fit the context", where="prompt", got=f"{len(prompt)} tokens", wanted=f"at most {longest}")
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in prompt):
        raise ConfigError("the prompt holds a token that this base does not have", where="prompt", wanted=f"ids from 0 to {vocabulary - 1}")
