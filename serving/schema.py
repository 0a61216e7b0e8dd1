"""Schema: what a client may send, in OpenAI's names, each with its bounds; and answers and errors in OpenAI's shape.

In: JSON. Out: strict models; a Job for the engine. Runs in: the ingress.

What this server does not do yet (tools, constrained output, images) is refused by name rather than passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from ftcore.engines.base import Sampling


def _encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Model = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_encodable)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_encodable)]
MAX_STOPS, MAX_BIAS, MAX_MESSAGES, MAX_PARTS, MAX_IDS, MAX_KEYS = 16, 1024, 2048, 64, 131_072, 64
MAX_LOGPROBS = 50_000
"""Log-probabilities in one answer: tokens x choices x alternatives."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        """An error for each of a million unknown keys would take longer than any answer."""
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"more than {MAX_KEYS} fields")
        return value


class Part(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: Annotated[Text, Field(max_length=256)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


class Asked(Strict):
    """What chat and text completions have in common."""

    model: Model
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(None, max_length=MAX_BIAS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    """Taken and not used: who asks is told by the key."""
    metadata: dict[str, str] | None = Field(None, max_length=16)
    """Taken and not used."""

    @field_validator("temperature", "top_p", "n", "stream", "presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        """OpenAI's clients send null for what was not set."""
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, num_logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=max(0, self.top_k), min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=self.logit_bias or {}, seed=self.seed, num_logprobs=num_logprobs,
        )  # fmt: skip


class ChatAsked(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatAsked:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[int], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
