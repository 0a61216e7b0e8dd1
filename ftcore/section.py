"""Section: the frozen, strict pydantic model every part of a recipe is made of, and Choice: a Section picked by `kind`.

In: plain dicts from YAML. Out: validated values, or errors that name the place and the nearest valid key. Runs in: everywhere; no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ftcore.errors import ConfigError
from ftcore.registry import Registry

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys refused, each field documented by the docstring under it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """`rank: true` is a mistake, not 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float, int | None, float | None):
            raise PydanticCustomError("number", "wanted a number")
        return value


class Choice(Section):
    """A Section that also acts, chosen by its `kind`: `{kind: lora, rank: 16}` is both the configuration and the behaviour.

    Subclass it for an axis (Method, Stage, ...), give the axis a Registry, and register one class per file.
    """

    kind: str
    """Which implementation."""


class _ChoiceSchema:
    """Draws a choice in JSON Schema as one branch per registered kind."""

    def __init__(self, registry: Registry[Any], default: str | None) -> None:
        self.registry, self.default = registry, default

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        branches: list[dict[str, Any]] = []
        short = []
        for kind, cls in self.registry.items():
            branch = handler.resolve_ref_schema(handler(cls.__pydantic_core_schema__))
            branch["properties"]["kind"] = {"const": kind, "description": (cls.__doc__ or "").split("\n")[0]}
            needed = [key for key in branch.get("required", []) if key != "kind"]
            branch["required"] = needed if kind == self.default else ["kind", *needed]
            branches.append(branch)
            if not needed:
                short.append(kind)
        return {"oneOf": [*branches, {"enum": short, "description": "A kind with its defaults."}]}


def chosen(base: type[Choice], registry: Registry[Any], default: str | None = None) -> Any:
    """The annotation for a recipe key that holds a choice: `method: chosen(Method, METHODS)`. `default`: the kind when none is written."""

    def pick(value: object) -> object:
        if isinstance(value, base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if default is not None and isinstance(value, dict):
            value = {"kind": default, **value}
        if not isinstance(value, dict) or "kind" not in value:
            raise PydanticCustomError("choice", "needs a `kind`: one of {kinds}", {"kinds": " | ".join(registry)})
        try:
            cls = registry[str(value["kind"])]
        except ConfigError as error:
            line = InitErrorDetails(
                type=PydanticCustomError(
                    "unknown_kind",
                    "unknown {axis}; wanted {wanted}; {hint}",
                    {"axis": registry.axis, "wanted": error.wanted, "hint": error.remedy or "see `ftcore schema`"},
                ),
                loc=("kind",),
                input=value["kind"],
            )
            raise ValidationError.from_exception_data(registry.axis, [line]) from None
        return cls.model_validate(value)

    return Annotated[SerializeAsAny[base], BeforeValidator(pick), _ChoiceSchema(registry, default)]  # type: ignore[valid-type,misc]


def leaf_paths(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all leaf keys of a Section class; choices count as one leaf each (their branches vary)."""
    paths: list[str] = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and not issubclass(inner, Choice):
            paths += leaf_paths(inner, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths
