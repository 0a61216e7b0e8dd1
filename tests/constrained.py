"""Random JSON schemas and regular expressions whose answers are short, and what an answer to them must be; for tests of constraints."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerBase

from ftcore import constraints as constraints_module
from ftcore.constraints import Constraint, Grammar, Grammars, json_constraint, regex_constraint
from ftcore.engines.base import Request, Sampling, Token
from tests.live_engines import DIGESTS, run


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


def compiled(tokenizer: PreTrainedTokenizerBase, *constraints: Constraint) -> list[Grammar]:
    async def go() -> list[Grammar]:
        grammars = Grammars(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
        try:
            return [await grammars.compile(each) for each in constraints]
        finally:
            grammars.close()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constraints_module, "COMPILE_S", 120.0)
        return run(go())


def some_requests(tokenizer: PreTrainedTokenizerBase, num: int, seed: int) -> tuple[list[Request], list[Any]]:
    rng = random.Random(seed)
    pairs = [some_constraint(rng) for _ in range(num)]
    requests = [
        Request(
            f"r{i}", tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 9))), rng.choice(["", *DIGESTS[:3]]), max_tokens=400,
            stop_ids=frozenset({tokenizer.eos_token_id}), constraint=grammar,
            sampling=Sampling(temperature=rng.choice([0.0, 1.0, 1.0, 1.0]), seed=i, num_logprobs=0),
        )
        for i, grammar in enumerate(compiled(tokenizer, *(constraint for constraint, _ in pairs)))
    ]  # fmt: skip
    return requests, [made for _, made in pairs]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[Token]) -> str:
    return tokenizer.decode([token.id for token in tokens[:-1]], skip_special_tokens=False)


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
DOUBLING = {
    "$ref": "#/$defs/a0",
    "$defs": {**{f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": {"type": "object"}},
}
HOSTILE: dict[str, tuple[Any, str]] = {
    "nested quantifiers": ("(a+)+$", ""),
    "stars of stars": ("((((a*)*)*)*)*b", ""),
    "large automaton": ("(a|b)*a(a|b){30}", ""),
    "million": ("[bc]a{1000000}", ""),
    "thousands of thousands": ("(([bc]a{1000}){1000}){1000}", ""),
    "spelled": ("a{0,99999999999999999999}", "cannot be compiled"),
    "brackets": ("(" * 1000 + ")" * 1000, "cannot be compiled"),
    "long": ("a" * 100_000, "too long"),
    "backreference": (r"(a)\1", "not supported"),
    "lookahead": ("(?=a)b", "not supported"),
    "unclosed": ("(a", "unclosed"),
    "nothing": (r"[^\s\S]", "cannot be met"),
    "windows": ("(.*a.{0,40}){0,40}", ""),
    "cycle": (CYCLE, "cannot be met"),
    "itself": ({"$ref": "#"}, "cannot be met"),
    "elsewhere": ({"$ref": "http://x.y/z"}, "cannot be compiled"),
    "doubling": (DOUBLING, ""),
    "deep": (deep(200), "nested too deeply"),
    "quite deep": (deep(20), ""),
    "huge enum": ({"enum": [f"v{i}" * 10 for i in range(100_000)]}, "too large"),
    "large enum": ({"enum": [f"v{i}" for i in range(2000)]}, ""),
    "long constant": ({"const": "a" * 100_000}, "too large|too long"),
    "many properties": ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}, "too"),
    "and of searches": ({"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(60)]}, "too many parts"),
    "pattern in a schema": ({"type": "string", "pattern": "a" * 3000}, r"schema\.pattern: this pattern is too long|too long"),
    "multiple": ({"type": "integer", "multipleOf": 999_999_937, "minimum": 0}, "cannot be compiled"),
    "long string": ({"type": "string", "minLength": 10**9, "maxLength": 10**9}, ""),
    "many items": ({"type": "array", "items": {"const": 1}, "minItems": 10**6}, ""),
    "no such type": ({"type": "object", "properties": {"a": {"type": "strin"}}}, r"schema\.properties\.a\.type: this is no JSON schema"),
    "no schema": ([1], "no JSON schema"),
    "false": (False, "cannot be compiled"),
    "unknown word": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "own options": ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
}
"""A pattern or schema; what it is refused with, or nothing where it is followed in bounded time."""
