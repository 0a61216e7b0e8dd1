"""Tool schema: tools, calls and formats as clients send them, in OpenAI's names (and vLLM's `structured_outputs`), with their bounds.

In: JSON. Out: strict models; the library's Tools, Constraint and messages. Runs in: the ingress.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from ftcore.constraints import Constraint, check_schema, choice_constraint, json_constraint, regex_constraint
from ftcore.data.formats.base import tool_calls_of
from ftcore.errors import ConfigError
from ftcore.tool_calls import Tools
from serving.strict import Strict, Text

MAX_TOOLS, MAX_CALLS, MAX_CHOICES = 128, 128, 1000
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
CallId = Annotated[Text, Field(min_length=1, max_length=64)]


class Function(Strict):
    name: FunctionName
    description: Annotated[Text, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; none: no arguments."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Strict):
    name: FunctionName
    arguments: Text


class ToolCall(Strict):
    """A call that a model made earlier."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self, where: str) -> dict[str, Any]:
        """As chat templates take it. Raises DataError where the arguments are no JSON."""
        place = f"{where}.function.arguments"
        try:
            call = tool_calls_of([self.model_dump()])[0]
            json.dumps(call, ensure_ascii=False).encode()
        except RecursionError:
            raise ConfigError(f"{place}: nested too deeply") from None
        except UnicodeEncodeError:
            raise ConfigError(f"{place}: this is not valid Unicode") from None
        return call


class JsonSchema(Strict):
    name: FunctionName
    description: Annotated[Text, Field(max_length=16_384)] | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None
    """Answers are held to the schema either way."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` goes with type json_schema, and only with it")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return json_constraint({"type": "object"}, "response_format")
        return json_constraint(self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(Strict):
    """vLLM's extension: one of three."""

    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        if sum(each is not None for each in (self.json_, self.regex, self.choice)) != 1:
            raise ValueError("exactly one of json, regex, choice")
        return self

    @property
    def constraint(self) -> Constraint:
        if self.json_ is not None:
            return json_constraint(self.json_, "structured_outputs.json")
        if self.regex is not None:
            return regex_constraint(self.regex, "structured_outputs.regex")
        return choice_constraint(self.choice or [], "structured_outputs.choice")


def tools_of(tools: Sequence[Tool], choice: Literal["none", "auto", "required"] | NamedTool | None, parallel: bool) -> Tools | None:
    """What the model may call. Raises ConfigError that says where for a broken schema or choice."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ConfigError("tools: two functions have the same name")
    if choice not in (None, "none", "auto") and not tools:
        raise ConfigError("tool_choice: there are no tools to choose from")
    num_objects = 0
    for i, tool in enumerate(tools):
        where, schema = f"tools[{i}].function.parameters", tool.function.parameters
        if schema is not None:
            num_objects = check_schema(schema, where, num_objects)
            if schema.get("type", "object") != "object":
                raise ConfigError(f"{where}.type: arguments are an object", got=str(schema["type"])[:40], wanted="object")
    only = choice.function.name if isinstance(choice, NamedTool) else ""
    if only and only not in names:
        raise ConfigError("tool_choice: there is no such function among the tools", got=only, wanted=", ".join(names)[:200])
    if not tools or choice == "none":
        return None
    definitions = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    return Tools(definitions, must=choice == "required" or bool(only), only=only, parallel=parallel and not only)
