"""Constrained answers: every one valid, masks as brute force finds them, neighbours untouched, hostile patterns bounded."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftcore import constraints
from ftcore.constraints import KEPT, ONE_LINE, Constraint, Grammars, Walk, choice_constraint, json_constraint, regex_constraint
from ftcore.engines.base import LiveEngine, Request
from ftcore.errors import ConfigError
from tests.constrained import HOSTILE, compiled, require_valid, some_requests, text_of
from tests.live_engines import DIGESTS, answer, opened, run
from tests.live_engines import adapters as adapters


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def bytes_of(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Each token's bytes; None for special ones."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in letters} | {
        chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in letters)
    }
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    return [None if i in special else bytes(table[char] for char in word) for i, word in enumerate(words)]


PATTERNS = (
    "(?:open|rename) [a-z]{2,5}", "a*b|c", "(?:é|è|ab)+!", "[0-9]{1,3}(?:\\.[0-9]+)?", "(?:the |one )*fox", "x?", "(a+)+b",
    '"(?:[a-z ]|q")*"',
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_is_every_token_that_keeps_the_answer_viable_and_no_other(tokenizer: PreTrainedTokenizerBase, pattern: str) -> None:
    words, (grammar,), rng = bytes_of(tokenizer), compiled(tokenizer, regex_constraint(pattern, "regex")), random.Random(0)
    rule = regex.compile(pattern.encode())
    for _ in range(4):
        walk, said = grammar.begin(), b""
        for _ in range(12):
            mask = walk.allowed()
            assert mask is not None
            want = {i for i, word in enumerate(words) if word and rule.fullmatch(said + word, partial=True)}
            want |= {tokenizer.eos_token_id} if rule.fullmatch(said) else set()
            assert set(np.flatnonzero(mask)) == want, said
            token = rng.choice(sorted(want))
            assert walk.accept(token)
            if token == tokenizer.eos_token_id:
                break
            said += words[token] or b""


async def loaded(engine: LiveEngine, adapters: dict[str, Path]) -> None:
    for digest in DIGESTS[:3]:
        await engine.load_adapter(digest, adapters[digest])


@pytest.mark.parametrize("num", [60, pytest.param(1000, marks=pytest.mark.proof)])
def test_every_constrained_answer_is_valid(
    num: int, tiny_model_dir: Path, adapters: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    async def go() -> None:
        async with opened(tiny_model_dir, max_batch=16, max_context=500) as engine:
            await loaded(engine, adapters)
            answers = await asyncio.gather(*(answer(engine, request) for request in requests))
            for made, tokens in zip(mades, answers, strict=True):
                assert tokens[-1].finish == "stop", (made, tokens[-1])
                require_valid(made, text_of(tokenizer, tokens))
        texts = {text_of(tokenizer, tokens) for tokens in answers}
        assert len(texts) > num / 2, "the answers hardly differ: this shows nothing"

    requests, mades = some_requests(tokenizer, num, seed=num)
    run(go(), 600)


def test_neighbours_change_no_answer_and_log_probabilities_are_the_models_own(
    tiny_model_dir: Path, adapters: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    requests, _ = some_requests(tokenizer, 4, seed=3)
    requests = [replace(each, max_tokens=12) for each in requests]
    free = [replace(each, id=f"f{i}", constraint=None) for i, each in enumerate(requests)]

    async def go() -> None:
        async with opened(tiny_model_dir, max_batch=12) as engine:
            await loaded(engine, adapters)
            alone = [await answer(engine, request) for request in [*requests, *free]]
            together = await asyncio.gather(*(answer(engine, request) for request in [*requests, *free]))
            for one, many in zip(alone, together, strict=True):
                assert [token.id for token in one] == [token.id for token in many]
            for request, held, loose in zip(requests, alone, alone[len(requests) :], strict=False):
                plain = await engine.next_logits([request.prompt], request.adapter)
                logps = np.asarray(plain[0], np.float64) - np.logaddexp.reduce(np.asarray(plain[0], np.float64))
                for tokens in (held, loose):
                    assert tokens[0].logprob == pytest.approx(logps[tokens[0].id], abs=1e-4)

    run(go())


def test_the_length_cuts_and_says_so(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (grammar,) = compiled(tokenizer, regex_constraint("[a-z]{50,60}", "regex"))
    stops = frozenset({tokenizer.eos_token_id})

    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            tokens = await answer(engine, Request("a", (5, 6), max_tokens=4, stop_ids=stops, constraint=grammar))
            assert (len(tokens), tokens[-1].finish) == (4, "length")
            with pytest.raises(ConfigError, match="stop token"):
                await answer(engine, Request("a", (5, 6), constraint=grammar))

    run(go())


def test_a_walk_that_cannot_go_on_ends_its_own_answer_with_the_reason(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fine = compiled(tokenizer, regex_constraint("[a-z]{50,60}", "regex"), regex_constraint("[0-9]{20}", "regex"))
    begin = slow.begin

    def begin_slow() -> Walk:
        walk = begin()
        walk._left_s = -1.0
        return walk

    monkeypatch.setattr(slow, "begin", begin_slow)
    stops = frozenset({tokenizer.eos_token_id})

    async def go() -> None:
        async with opened(tiny_model_dir) as engine:
            bad, good = await asyncio.gather(
                answer(engine, Request("a", (5, 6), max_tokens=60, stop_ids=stops, constraint=slow)),
                answer(engine, Request("b", (5, 6), max_tokens=60, stop_ids=stops, constraint=fine)),
            )
            assert (bad[-1].finish, bad[-1].problem) == ("abort", "the constraint is too slow to follow")
            assert good[-1].finish == "stop" and text_of(tokenizer, good).isdigit()

    run(go())


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_or_followed_in_bounded_time(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    made, words = HOSTILE[name]
    started = time.process_time()

    def follow() -> None:
        (grammar,) = compiled(tokenizer, regex_constraint(made, "regex") if isinstance(made, str) else json_constraint(made, "schema"))
        walk, rng = grammar.begin(), random.Random(0)
        for _ in range(100):
            mask = walk.allowed()
            if mask is None:
                assert "too" in walk.problem
                return
            token = rng.choice(np.flatnonzero(mask).tolist())
            assert walk.accept(token)
            if token == tokenizer.eos_token_id:
                return

    if words:
        with pytest.raises(ConfigError, match=words):
            follow()
    else:
        follow()
    assert time.process_time() - started < 6


def test_a_constraint_is_compiled_once_however_many_ask_and_only_the_last_are_kept(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Constraint] = []
    compile_one = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, constraint, words: made.append(constraint) or compile_one(self, constraint, words)
    )

    async def go() -> None:
        grammars = Grammars(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
        first = regex_constraint("a+", "regex")
        found = await asyncio.gather(*(grammars.compile(first) for _ in range(8)))
        assert len({id(each) for each in found}) == 1 == len(made)
        for i in range(KEPT + 5):
            await grammars.compile(regex_constraint(f"b{i}", "regex"))
        assert len(grammars._tasks) <= KEPT
        await grammars.compile(first)
        assert made.count(first) == 2
        for _ in range(2):  # what was refused is not remembered
            with pytest.raises(ConfigError):
                await grammars.compile(Constraint("start: /(/"))
        assert made.count(Constraint("start: /(/")) == 2
        grammars.close()

    run(go())


def test_a_choice_is_one_of_the_choices_and_json_has_no_room_for_endless_blanks(tokenizer: PreTrainedTokenizerBase) -> None:
    choices = ["yes", 'no "or" so', "né\n"]
    choice, schema = compiled(tokenizer, choice_constraint(choices, "choice"), json_constraint({"type": "object"}, "schema"))
    for text in (*choices, "yesno", ""):
        walk = choice.begin()
        taken = all(walk.accept(token) for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        assert taken == (text in choices), text
    for blanks, fits in (("", True), (" ", True), ("\n    ", True), ("\n\n", False), (" " * 30, False)):
        walk = schema.begin()
        assert all(walk.accept(token) for token in tokenizer(json.dumps({"a": 1}).replace(" ", blanks))["input_ids"]) == fits, blanks


def test_json_stands_on_one_line_where_a_pattern_of_blanks_would_match_again_and_again(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "_blanks", lambda: ONE_LINE)
    (grammar,) = compiled(tokenizer, json_constraint({"type": "object"}, "schema"))
    value = {"a": [1, 2], "b": {}}
    for text, fits in (
        (json.dumps(value), True), (json.dumps(value, separators=(",", ":")), True), (json.dumps(value, indent=1), False),
        (json.dumps(value).replace(" ", "  "), False), ("{ ", False),
    ):  # fmt: skip
        walk = grammar.begin()
        assert all(walk.accept(token) for token in tokenizer(text)["input_ids"]) == fits, text
