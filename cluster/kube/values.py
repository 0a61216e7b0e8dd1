"""Values: one value against one schema, as an API server judges it: type, format, enum, bounds, pattern.

In: a value and its schema (a CRD's, or a core kind's). Out: what is wanted of it, where it is not so. Runs in: a terminal; imports no ray.

Patterns are RE2's, in RE2 itself. Python's `re` differs: its `$` also matches before a last newline, its `\\d` takes digits of any script,
and it reads look-around and back references, which an API server refuses.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import re2

from cluster.kube.crds import Schema

INT_OR_STRING = "x-kubernetes-int-or-string"
INTEGERS = {"int32": 2**31, "int64": 2**63}
# RFC 3339 as the API server's strfmt reads it: `T` may be a space or small, the zone is needed.
DATE_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:?\d{2})", re.ASCII)
MAX_SHOWN = 80


@dataclass(frozen=True)
class Wrong:
    """What a value is not. `rule` names the family: type, format, enum, bounds, length, pattern, items."""

    rule: str
    wanted: str
    remedy: str = ""


def shown(value: object) -> str:
    """As JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def types(schema: Schema) -> tuple[str, ...]:
    """`null` apart: nulls are gone before values are judged. Empty: any type."""
    named = schema.get("type") or (("integer", "string") if schema.get(INT_OR_STRING) else ())
    return tuple(name for name in ([named] if isinstance(named, str) else named) if name != "null")


def is_type(value: object, name: str) -> bool:
    """JSON Schema's types: true is no number, and 2.0 is an integer."""
    if isinstance(value, bool):
        return name == "boolean"
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    checks: Mapping[str, bool] = {
        "string": isinstance(value, str),
        "number": is_number,
        "integer": is_number and value == int(value),  # type: ignore[call-overload]
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
    }
    return checks.get(name, False)


def wrong_type(value: object, schema: Schema) -> Wrong | None:
    """A value of the wrong type; nothing else is asked of it then."""
    wanted = types(schema)
    if not wanted or any(is_type(value, name) for name in wanted):
        return None
    return Wrong("type", described({"type": list(wanted)}), _cure(value, wanted))


def described(schema: Schema) -> str:
    """What a value of this schema is, in few words."""
    if schema.get("enum"):
        return "one of " + ", ".join(shown(choice) for choice in schema["enum"])
    return " or ".join(f"an {name}" if name[0] in "aio" else f"a {name}" for name in types(schema)) or "a value"


def _cure(value: object, wanted: tuple[str, ...]) -> str:
    if "string" in wanted and isinstance(value, bool | int | float):
        return "write it in quotes: YAML reads it as " + ("a boolean" if isinstance(value, bool) else "a number")
    if isinstance(value, str) and ({"integer", "number"} & set(wanted)) and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return "take the quotes away"
    if isinstance(value, str) and "boolean" in wanted and value.lower() in ("true", "false"):
        return "take the quotes away"
    if "array" in wanted and isinstance(value, dict):
        return "begin each item with `- `"
    return "null stands for nothing only where a field may be null" if value is None else ""


def wrongs(value: Any, schema: Schema) -> Iterator[Wrong]:
    """Of a value whose type is right: everything else that its schema says of the value itself."""
    if "enum" in schema and value not in schema["enum"]:
        yield Wrong("enum", described(schema))
    if isinstance(value, str):
        yield from _of_text(value, schema)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _of_number(value, schema)
    elif isinstance(value, list):
        yield from _of_count(len(value), schema, "Items", "items")
    elif isinstance(value, dict):
        yield from _of_count(len(value), schema, "Properties", "keys")


def _of_text(value: str, schema: Schema) -> Iterator[Wrong]:
    yield from _of_count(len(value), schema, "Length", "characters")
    if "pattern" in schema and not _compiled(schema["pattern"]).search(value):
        quantity = "a quantity, like 500m, 2 or 4Gi" if "KMGTPE" in schema["pattern"] else ""
        yield Wrong("pattern", quantity or f"a match of {schema['pattern']}")
    check = FORMATS.get(schema.get("format", ""))
    if check and not check[0](value):
        yield Wrong("format", check[1])


def _of_number(value: float, schema: Schema) -> Iterator[Wrong]:
    bound = INTEGERS.get(schema.get("format", ""))
    if bound and not -bound <= value < bound:
        yield Wrong("format", f"an {schema['format']}: {-bound} to {bound - 1}")
    low, high, step = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    if low is not None and (value <= low if schema.get("exclusiveMinimum") else value < low):
        yield Wrong("bounds", f"more than {low}" if schema.get("exclusiveMinimum") else f"{low} or more")
    if high is not None and (value >= high if schema.get("exclusiveMaximum") else value > high):
        yield Wrong("bounds", f"less than {high}" if schema.get("exclusiveMaximum") else f"{high} or less")
    if step and value % step:
        yield Wrong("bounds", f"a multiple of {step}")


def _of_count(count: int, schema: Schema, suffix: str, called: str) -> Iterator[Wrong]:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    rule = "length" if suffix == "Length" else "items"
    if low is not None and count < low:
        yield Wrong(rule, f"at least {low} {called}, there are {count}")
    if high is not None and count > high:
        yield Wrong(rule, f"at most {high} {called}, there are {count}")


@cache
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def _parses(read: Callable[[str], object]) -> Callable[[str], bool]:
    def check(value: str) -> bool:
        try:
            read(value)
        except ValueError:
            return False
        return True

    return check


# A format that is not here holds for every value, as for an API server that does not know it.
FORMATS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "date-time": (lambda value: bool(DATE_TIME.fullmatch(value)), "a time, like 2026-01-31T12:00:00Z"),
    "byte": (_parses(lambda value: base64.b64decode(re.sub(r"[\r\n]", "", value), validate=True)), "base64"),  # as Go: lines may end in it
    "ipv4": (_parses(ipaddress.IPv4Address), "an IPv4 address"),
    "ipv6": (_parses(ipaddress.IPv6Address), "an IPv6 address"),
    "cidr": (_parses(lambda value: ipaddress.ip_network(value, strict=False)), "an address block, like 10.0.0.0/8"),
}
