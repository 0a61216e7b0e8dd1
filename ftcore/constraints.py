"""Constraints: answers that are held, token by token, to a JSON schema, a regular expression or a list of choices.

In: a Constraint (plain text, so that it travels), a tokenizer. Out: a Grammar, compiled once; a Walk through it for each answer, which says
what tokens may come next. Runs in: serving replicas (compiling, in threads of its own), the engine's thread (walking); no torch.

llguidance does both, by derivatives: no pattern makes it backtrack. What would make it slow or large all the same (huge schemas, many
patterns at once) is refused by size before it is compiled, by the library's own fuel while it is, by the clock after that; and a Walk
that goes on costing too much ends its own answer and nobody else's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcore.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CHARACTERS, MAX_DEPTH, MAX_PATTERN, MAX_LITERAL, MAX_PATTERNS, MAX_ALL_OF, MAX_PROPERTIES = 32_768, 64, 2048, 2000, 64, 8, 400
MAX_OBJECTS = 2000
"""Objects and booleans of a format, or of all tools together: any of them may be a schema, which takes half a millisecond to check."""
MAX_TYPES = 64
"""Of one `type`: whether any is there twice is found by comparing all pairs."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 400_000, "step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
}  # fmt: skip
"""The library's own units: memory below some 40 MB and a step below some 10 ms."""
COMPILE_S = 5.0
KEPT = 64
"""Grammars, the last ones used."""
START_S, TOKEN_S = 1.0, 0.02
"""Processor seconds that a Walk may have cost: some to begin with, and some for each token."""
BLANKS = r"[ ]?|\n[ ]{0,24}"
"""Between the parts of a JSON answer: no model can spin on blanks for ever."""
ONE_LINE = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
"""Instead of BLANKS where llguidance, before 1.8, lets a pattern of blanks match again and again."""
HEAD = '%llguidance {"no_forcing": true}\n'
"""Also where only one text can follow, the model chooses its tokens; looking for such text is slow where it is long."""


@dataclass(frozen=True)
class Constraint:
    """What an answer has to be, as a grammar in llguidance's Lark."""

    lark: str

    def grammar(self, endings: Collection[int] = ()) -> str:
        """All that llguidance reads. Where an answer is complete, it may also end with one of these tokens: for who follows it elsewhere,
        with the one stop token of the tokenizer alone."""
        if not endings:
            return HEAD + self.lark
        ids, answer = ",".join(map(str, sorted(endings))), self.lark.replace("start:", "answer:", 1)
        return f"{HEAD}start: answer <[{ids}]>?\n{answer}"


def json_constraint(schema: Any, where: str) -> Constraint:
    """`where`: how the person who sent the schema calls it. Raises ConfigError for what is no schema, or too large a one."""
    check_schema(schema, where)
    return Constraint(f"start: {json_rule(schema)}")


def regex_constraint(pattern: str, where: str) -> Constraint:
    _check_pattern(pattern, where)
    return Constraint(f"start: {regex_rule(pattern)}")


def choice_constraint(choices: Sequence[str], where: str) -> Constraint:
    longest, total = max(map(len, choices), default=0), sum(map(len, choices))
    if longest > MAX_LITERAL or total > MAX_CHARACTERS:
        wanted = f"at most {MAX_LITERAL}, and {MAX_CHARACTERS} together"
        raise ConfigError(f"{where}: the choices are too long", got=f"{longest} characters, {total} together", wanted=wanted)
    return Constraint("start: " + " | ".join(text_rule(choice) for choice in choices))


def json_rule(schema: Any) -> str:
    """A schema with our blanks, and with none of llguidance's options left to the sender."""
    options = {**_blanks(), "lenient": False}
    return f"%json {json.dumps({**schema, 'x-guidance': options} if isinstance(schema, dict) else schema, ensure_ascii=False)}"


@cache
def _blanks() -> dict[str, Any]:
    try:
        major, minor = version("llguidance").split(".")[:2]
    except PackageNotFoundError:  # who only writes constraints down need not have it
        return {"whitespace_pattern": BLANKS}
    return {"whitespace_pattern": BLANKS} if (int(major), int(minor)) >= (1, 8) else ONE_LINE


def regex_rule(pattern: str) -> str:
    """A pattern between slashes, on one line; what would end it there is escaped."""
    escaped = re.sub(r"\\.|[/\n]", lambda found: {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.DOTALL)
    return f"/{escaped}/" if escaped else '""'


def text_rule(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def check_schema(schema: Any, where: str, num_before: int = 0) -> int:
    """How many objects and booleans it and those before it hold. Raises ConfigError, which says where, unless this is a JSON schema of a
    size that can be checked and compiled in bounded time."""
    size, patterns, ands, num_objects = 0, 0, False, num_before
    for path, value in _parts(schema, where):
        size += len(value) + 2 if isinstance(value, str) else 4
        if size > MAX_CHARACTERS:
            raise ConfigError(f"{where}: this schema is too large", got="more", wanted=f"about {MAX_CHARACTERS} characters")
        num_objects += isinstance(value, dict | bool)
        if num_objects > MAX_OBJECTS:
            wanted = f"at most {MAX_OBJECTS} objects and booleans, in those of all tools together"
            raise ConfigError(f"{where}: this schema has too many parts", got="more", wanted=wanted)
        if isinstance(value, str) and not _is_unicode(value):
            raise ConfigError(f"{where}: this is not valid Unicode")
        if isinstance(value, str) and len(value) > MAX_LITERAL and not path.endswith((".description", ".title")):
            raise ConfigError(f"{path}: this text is too long", got=f"{len(value)} characters", wanted=f"at most {MAX_LITERAL}")
        if isinstance(value, dict):
            own, by_name = value.get("pattern"), value.get("patternProperties")
            for pattern in [*(by_name if isinstance(by_name, dict) else ()), *([own] if isinstance(own, str) else [])]:
                _check_pattern(pattern, f"{path}.pattern")
                patterns += 1
            if isinstance(value.get("allOf"), list):
                ands = True
                if len(value["allOf"]) > MAX_ALL_OF:
                    raise ConfigError(f"{path}.allOf: too many parts", got=str(len(value["allOf"])), wanted=f"at most {MAX_ALL_OF}")
            if isinstance(kinds := value.get("type"), list) and len(kinds) > MAX_TYPES:
                raise ConfigError(f"{path}.type: too many types", got=str(len(kinds)), wanted=f"at most {MAX_TYPES}")
            if len(value) > MAX_PROPERTIES:
                raise ConfigError(f"{path}: too many entries", got=str(len(value)), wanted=f"at most {MAX_PROPERTIES}")
    if patterns > (MAX_ALL_OF if ands else MAX_PATTERNS):
        raise ConfigError(f"{where}: too many patterns", got=str(patterns), wanted=f"at most {MAX_PATTERNS}, {MAX_ALL_OF} beside an allOf")
    _check_meta(schema, where)
    return num_objects


def _parts(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every part of a tree, names of entries too."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path[:200]}: nested too deeply", got=f"more than {MAX_DEPTH} levels", wanted=f"at most {MAX_DEPTH}")
    yield path, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield path, key
            yield from _parts(part, f"{path}.{key}"[:300], depth + 1)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _parts(part, f"{path}[{i}]"[:300], depth + 1)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _check_meta(schema: Any, where: str) -> None:
    error = next(_meta().iter_errors(schema), None)
    if error is not None:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise ConfigError(f"{where}{place}"[:300] + f": this is no JSON schema: {error.message[:200]}")


@cache
def _meta() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(Draft202012Validator.META_SCHEMA)


def _check_pattern(pattern: str, where: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(f"{where}: this pattern is too long", got=f"{len(pattern)} characters", wanted=f"at most {MAX_PATTERN}")


class Grammar:
    """A compiled constraint, for one tokenizer; many answers walk through it at once."""

    def __init__(self, constraint: Constraint, matcher: Any, vocabulary: int) -> None:
        self.constraint, self._matcher, self._vocabulary = constraint, matcher, vocabulary

    def begin(self) -> Walk:
        return Walk(self._matcher.deep_copy(), self._vocabulary)


class Walk:
    """One answer's way through a grammar. A stop token is allowed where the grammar is complete, and nowhere else."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._left_s = START_S
        self.problem = ""
        """Why the answer cannot go on; empty while it can."""

    def allowed(self) -> np.ndarray | None:
        """bool [V]: the tokens that may come next; None when there is a problem."""
        if self.problem:
            return None
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little", count=self._vocabulary).view(np.bool_)
        self._left_s += TOKEN_S - (time.thread_time() - started)
        if self._matcher.is_error():
            self.problem = f"the constraint became too complex ({_first_line(self._matcher.get_error())})"
        elif self._left_s < 0:
            self.problem = "the constraint is too slow to follow"
        elif not mask.any():
            self.problem = "this base has no token with which the constraint can go on"
        return None if self.problem else mask

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return not self.problem and bool(self._matcher.is_accepting())

    def accept(self, token: int) -> bool:
        """Takes the token that came; False when there is a problem."""
        if not self.problem and not self._matcher.consume_token(token):
            self.problem = "the answer left its constraint"
        return not self.problem


class Grammars:
    """Compiles constraints for one tokenizer, two at a time and each once, and keeps the last ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], vocabulary: int) -> None:
        self._tokenizer, self._stop_ids, self._vocabulary = tokenizer, sorted(stop_ids), vocabulary
        self._words: asyncio.Future[Any] | None = None
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._tasks: OrderedDict[Constraint, asyncio.Future[Grammar]] = OrderedDict()

    async def compile(self, constraint: Constraint) -> Grammar:
        """Raises ConfigError for what cannot be compiled, or not in time."""
        loop = asyncio.get_running_loop()
        if self._words is None:  # a second or two for a large vocabulary, once
            self._words = loop.run_in_executor(self._threads, _words, self._tokenizer, self._stop_ids, self._vocabulary)
        words = await asyncio.shield(self._words)
        task = self._tasks.get(constraint)
        if task is None:
            task = loop.run_in_executor(self._threads, self._compile, constraint, words)
            self._tasks[constraint] = task
            task.add_done_callback(partial(self._forget_failed, constraint))
        self._tasks.move_to_end(constraint)
        for old in [each for each, made in self._tasks.items() if made.done()][: max(0, len(self._tasks) - KEPT)]:
            del self._tasks[old]
        try:
            return await asyncio.wait_for(asyncio.shield(task), COMPILE_S)
        except TimeoutError:
            raise ConfigError("the constraint takes too long to compile", got="more", wanted=f"{COMPILE_S:g} s") from None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget_failed(self, constraint: Constraint, task: asyncio.Future[Grammar]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._tasks.pop(constraint, None)

    def _compile(self, constraint: Constraint, words: Any) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(words, constraint.grammar(), log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS))
        grammar = Grammar(constraint, matcher, self._vocabulary)
        if matcher.is_error():
            raise ConfigError(f"the constraint cannot be compiled: {_first_line(matcher.get_error())}")
        first = grammar.begin()
        if first.allowed() is None:
            raise ConfigError(f"the constraint cannot be met: {first.problem}")
        return grammar


class _Words:
    """The tokenizer's tokens as bytes, in the form that llguidance asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, plain: Any, special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens = [plain.decode_bytes([token]) for token in range(plain.vocab_size)]
        self.special_token_ids, self.eos_token_id = special_token_ids, eos_token_id
        self._plain = plain

    def __call__(self, text: str) -> list[int]:
        return list(self._plain.greedy_tokenize(text))


def _words(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], vocabulary: int) -> Any:
    """Special tokens, and numbers that the tokenizer does not know, are no text: no pattern allows them."""
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise ConfigError("answers are held to a format by llguidance, which this server does not have") from error
    if not stop_ids:
        raise ConfigError("this base has no stop token, so a constrained answer could not end")
    try:
        plain = LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=max(vocabulary, len(tokenizer)), eos_token=stop_ids)
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            "answers of this base's tokenizer cannot be constrained", got=str(error)[:200], wanted="a byte-level one"
        ) from error
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    special |= set(range(len(tokenizer), plain.vocab_size)) | set(stop_ids)
    words: Any = _Words(plain, sorted(special), stop_ids[0])
    return LLTokenizer(words, n_vocab=plain.vocab_size, eos_token=stop_ids)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip().startswith("error:")), text.partition("\n")[0]).strip()[:200]
