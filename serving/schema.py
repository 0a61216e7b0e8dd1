"""Schema: what a client may send, in OpenAI's names, each with its bounds; and answers and errors in OpenAI's shape.

In: JSON. Out: strict models; a Job for the engine. Runs in: the ingress.

What this server does not do yet (images, audio, prefixes of an answer) is refused by name rather than passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from ftcore.constraints import Constraint
from ftcore.data.types import Message
from ftcore.engines.base import Sampling
from ftcore.errors import ConfigError
from ftcore.tool_calls import Tools
from serving.strict import Strict, Text, encodable
from serving.tool_schema import MAX_CALLS, MAX_TOOLS, CallId, NamedTool, ResponseFormat, StructuredOutputs, Tool, ToolCall, tools_of

Model = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(encodable)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(encodable)]
MAX_STOPS, MAX_BIAS, MAX_MESSAGES, MAX_PARTS, MAX_IDS = 16, 1024, 2048, 64, 131_072
MAX_INPUTS = 256
INPUTS: Any = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
Ids = Annotated[list[int], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
NAMED_OTHERWISE = {
    "guided_json": "structured_outputs: {json: ...}", "guided_regex": "structured_outputs: {regex: ...}",
    "guided_choice": "structured_outputs: {choice: [...]}", "functions": "tools", "function_call": "tool_choice",
}  # fmt: skip
"""Older names of other servers' fields, and ours."""
MAX_LOGPROBS = 50_000
"""Log-probabilities in one answer: tokens x choices x alternatives."""


class Part(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[Text, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    """Clients send answers back with what is empty in them."""

    @model_validator(mode="after")
    def _fields_are_the_roles_own(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are an assistant's")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with role tool, and only with it")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has content")
        return self

    def plain(self, where: str) -> Message:
        """As the library takes it; OpenAI's `developer` is our `system`."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = tuple(call.plain(f"{where}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls or ()))
        return Message("system" if self.role == "developer" else self.role, text, tool_calls=calls, tool_call_id=self.tool_call_id or "")


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
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(None, max_length=512)
    """Meets the same one of the versions that share a name; who asks is told by the key."""
    metadata: dict[str, str] | None = Field(None, max_length=16)
    """Taken and not used."""
    store: Literal[False] = False
    """No answer is kept."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, value: Any) -> Any:
        other = next((name for name in NAMED_OTHERWISE if isinstance(value, dict) and value.get(name) is not None), None)
        if other is not None:
            raise ValueError(f"{other} is not taken here; ask with {NAMED_OTHERWISE[other]}")
        return value

    @property
    def has_form(self) -> bool:
        return self.structured_outputs is not None

    def form(self) -> tuple[Constraint | None, Tools | None]:
        """What the answer is held to, and what it may call. A large schema takes long to check: not for an event loop.

        Raises ConfigError that says where for a schema or pattern that cannot be one.
        """
        return (self.structured_outputs.constraint if self.structured_outputs else None), None

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
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatAsked:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def prompt(self) -> tuple[Message, ...]:
        return tuple(message.plain(f"messages[{i}]") for i, message in enumerate(self.messages))

    @property
    def has_form(self) -> bool:
        return super().has_form or self.response_format is not None or self.tools is not None or self.tool_choice is not None

    def form(self) -> tuple[Constraint | None, Tools | None]:
        if self.response_format is not None and self.response_format.type != "text" and self.structured_outputs is not None:
            raise ConfigError("response_format and structured_outputs ask for two formats", got="both", wanted="one of them")
        constraint, _ = super().form()
        own = self.response_format.constraint if self.response_format else None
        tools = tools_of(self.tools or (), self.tool_choice, self.parallel_tool_calls is not False)
        if tools is not None and (own or constraint) is not None:
            raise ConfigError(
                "an answer is held to a format or may call tools, not both", got="both", wanted="tool_choice none, or no format"
            )
        return own or constraint, tools

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    """POST /v1/completions"""

    prompt: Text | Ids
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _only_one(cls, value: Any) -> Any:
        """Clients may send a list of prompts."""
        return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list) else value

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16


class EmbeddingsAsked(Strict):
    """POST /v1/embeddings"""

    model: Model
    input: Text | Ids | Annotated[list[Text], INPUTS] | Annotated[list[Ids], INPUTS]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    """A base has one."""
    user: str | None = Field(None, max_length=512)
    """As above."""

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(self.input, str):
            return (self.input,)
        if isinstance(self.input[0], int):
            return (tuple(token for token in self.input if isinstance(token, int)),)
        return tuple(each if isinstance(each, str) else tuple(each) for each in self.input if not isinstance(each, int))


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
