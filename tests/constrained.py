"""Random JSON schemas and regular expressions whose answers are short, and what an answer to them must be; for tests of constraints."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from jsonschema import Draft202012Validator

from ftcore.constraints import Constraint, json_constraint, regex_constraint


def some_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"] + ["object", "array", "anyOf"] * 2 * (depth < 2)
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 8)}
    if kind in ("integer", "number"):
        return {
            "type": kind,
            "minimum": -rng.randrange(100),
            "maximum": rng.randrange(1, 1000),
            **({"multipleOf": 0.25} if kind == "number" else {}),
        }
    if kind == "enum":
        return {"enum": rng.sample([1, "one", 'q"u\\o\n', None, True, [1, 2], {"a": 1}, "é", 2.5], 3)}
    if kind == "const":
        return {"const": rng.choice(["a", {"b": [1, "ü"]}, 7])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^(x|yz)+[0-9]$", "^\\d{3}-\\d{4}$"]), "maxLength": 12}
    if kind == "object":
        names = rng.sample(["name", "x y", "é", "size", "a.b", "$"], rng.randrange(1, 4))
        return {
            "type": "object", "properties": {name: some_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)), "additionalProperties": False,
        }  # fmt: skip
    if kind == "array":
        return {"type": "array", "items": some_schema(rng, depth + 1), "minItems": rng.randrange(2), "maxItems": rng.randrange(2, 4)}
    if kind == "anyOf":
        return {"anyOf": [some_schema(rng, depth + 1), some_schema(rng, depth + 1)]}
    return {"type": kind}


def some_regex(rng: random.Random, depth: int = 0) -> str:
    kind = rng.choice(["literal", "class", "count"] + ["either", "both", "maybe"] * (depth < 3))
    if kind == "literal":
        return rng.choice(["a", "the", r"\.", "é", "OK ", "\\\\", "0", '"'])
    if kind == "class":
        return rng.choice(["[a-z]", r"[0-9]", "[^a-z\n]", ".", "[é-ü]"])
    if kind == "count":
        return f"{rng.choice(['[a-z]', '[0-9]', '(?:ab|c)'])}{{{rng.randrange(3)},{rng.randrange(3, 6)}}}"
    first, second = some_regex(rng, depth + 1), some_regex(rng, depth + 1)
    return {"either": f"(?:{first}|{second})", "both": first + second, "maybe": f"(?:{first})?{second}"}[kind]


def some_constraint(rng: random.Random) -> tuple[Constraint, Any]:
    """A constraint, and the schema or pattern it was made from."""
    made: Any = some_schema(rng) if rng.random() < 0.7 else some_regex(rng)
    return (regex_constraint(made, "regex") if isinstance(made, str) else json_constraint(made, "schema")), made


def require_valid(made: Any, text: str) -> None:
    if isinstance(made, str):
        assert re.fullmatch(made, text), (made, text)
    else:
        Draft202012Validator(made).validate(json.loads(text))
