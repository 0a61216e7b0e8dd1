"""The vllm engine against plain PEFT: one engine for all tests, in an environment that has vLLM (tests/contract/test_vllm.py).

Log-probabilities are held to 1e-4, as the torch engine's: both compute in fp32 and differ from PEFT by the order of sums alone, which was
measured at 1e-5; the nearest other adapter is 1e-3 away at least.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftcore.constraints import Grammar, Walk, json_constraint, regex_constraint
from ftcore.engines.base import EngineEnded, LiveEngine, Request, Sampling, Token
from ftcore.engines.vllm import Vllm
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.lean_imports import PeftModel
from ftcore.models import load_base
from ftcore.probes import compare, record
from ftcore.recipe import Model
from tests.conftest import make_tiny_model
from tests.constrained import HOSTILE, compiled, require_valid, some_requests, text_of
from tests.live_engines import DIGESTS, answer, come_and_go, mixed, require_own, some_request, spoiled
from tests.live_engines import adapters as adapters
from tests.live_engines import truth as truth
from tests.oracles import Truth

pytest.importorskip("vllm", reason="vLLM is not installed here: tests/contract/test_vllm.py runs this in its own environment")
Run = Callable[[Callable[[LiveEngine], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wider-model"), hidden=128)  # heads of 32, vLLM's least


@pytest.fixture(scope="module")
def use(tiny_model_dir: Path) -> Iterator[Run]:
    """Runs a coroutine over the one engine: fewer slots than adapters, so that they take turns."""
    loop = asyncio.new_event_loop()
    section = Vllm(max_batch=12, max_context=512, dtype="fp32", kv_cache_mib=64, max_loras=4, max_cpu_loras=10, max_rank=16)
    engine = loop.run_until_complete(section.open(str(tiny_model_dir)))
    yield lambda task: loop.run_until_complete(asyncio.wait_for(task(engine), 600))
    loop.run_until_complete(engine.close())
    loop.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


class SlowGrammar(Grammar):
    """Its walks have used up their time."""

    def begin(self) -> Walk:
        walk = super().begin()
        walk._left_s = -1.0
        return walk


async def load_all(engine: LiveEngine, adapters: dict[str, Path]) -> None:
    await asyncio.gather(*(engine.load_adapter(digest, folder) for digest, folder in adapters.items()))


def test_every_row_of_a_mixed_batch_is_its_own_adapters(use: Run, adapters: dict[str, Path], truth: Truth) -> None:
    async def go(engine: LiveEngine) -> list[tuple[Request, list[Token]]]:
        await load_all(engine, adapters)
        return await mixed(engine, random.Random(0))

    for request, tokens in use(go):
        assert [token.finish for token in tokens] == [None] * 9 + ["length"]
        require_own(truth, request, tokens)


@pytest.mark.parametrize("num_requests", [200, pytest.param(2000, marks=pytest.mark.proof)])
def test_no_answer_is_wrong_while_adapters_come_and_go(use: Run, adapters: dict[str, Path], truth: Truth, num_requests: int) -> None:
    done = use(lambda engine: come_and_go(engine, adapters, num_requests, pause_s=0.05))
    assert len(done) == num_requests
    for request, tokens in done:
        require_own(truth, request, tokens)


def test_cached_keys_serve_their_own_digest_and_salt_alone(use: Run, adapters: dict[str, Path], truth: Truth) -> None:
    """vLLM reuses whole blocks of 128 tokens."""

    async def go(engine: LiveEngine) -> list[tuple[Request, list[Token], int]]:
        found = []
        prompt = tuple(3 + i % 200 for i in range(140))

        async def asked(name: str, digest: str, salt: str) -> None:
            before = engine.stats().num_reused_tokens
            request = Request(name, (*prompt, len(found) + 9), digest, max_tokens=4, salt=salt, sampling=Sampling(0, num_logprobs=0))
            found.append((request, await answer(engine, request), engine.stats().num_reused_tokens - before))

        await load_all(engine, adapters)
        for number, (digest, salt) in enumerate(
            [(DIGESTS[0], ""), (DIGESTS[0], ""), (DIGESTS[1], ""), ("", ""), (DIGESTS[0], "other"), (DIGESTS[1], ""), ("", "")]
        ):
            await asked(f"p{number}", digest, salt)
        await engine.unload_adapter(DIGESTS[0])
        await engine.load_adapter(DIGESTS[0], adapters[DIGESTS[0]])
        await asked("again", DIGESTS[0], "")
        return found

    found = use(go)
    assert [reused for _, _, reused in found] == [0, 128, 0, 0, 0, 128, 128, 0]
    for request, tokens, _ in found:
        require_own(truth, request, tokens)


def test_another_version_in_the_same_place_never_meets_the_old_one(
    use: Run, adapters: dict[str, Path], truth: Truth, tmp_path: Path
) -> None:
    """One folder is replaced again and again while the versions it held before go on answering."""

    async def go(engine: LiveEngine) -> list[tuple[Request, list[Token]]]:
        found, prompt = [], tuple(3 + i % 190 for i in range(140))
        place = tmp_path / "support"
        for turn in range(24):
            digest = DIGESTS[turn % 8]
            place.unlink(missing_ok=True)
            place.symlink_to(adapters[digest])
            await engine.unload_adapter(digest)
            await engine.load_adapter(digest, place)
            for asked in (digest, DIGESTS[turn * 5 % 8]):
                if asked in engine.stats().adapters:
                    request = Request(f"v{turn}", prompt, asked, max_tokens=6, sampling=Sampling(0, num_logprobs=0))
                    found.append((request, await answer(engine, request)))
        return found

    found = use(go)
    assert len(found) > 40
    for request, tokens in found:
        require_own(truth, request, tokens)


def test_sampling_means_what_it_means_elsewhere(use: Run, truth: Truth) -> None:
    prompt = tuple(range(5, 40))

    async def go(engine: LiveEngine) -> None:
        async def said(name: str, *, tokens: int = 8, stop: frozenset[int] = frozenset(), **keys: Any) -> list[Token]:
            return await answer(engine, Request(name, prompt, "", tokens, stop, Sampling(**keys)))

        greedy = [token.id for token in await said("greedy", temperature=0)]
        text = greedy.copy()
        logps = truth.answer_logps("", prompt, text)
        assert text == logps.argmax(-1).tolist()
        for name, keys in {"top_k": {"top_k": 1}, "top_p": {"top_p": 0.0}, "min_p": {"min_p": 1.0}}.items():
            assert [token.id for token in await said(name, seed=3, **keys)] == text
        ranked = await said("ranked", temperature=0, num_logprobs=5, logit_bias={text[0]: -1000.0})
        assert ranked[0].id == logps[0].topk(2).indices[1]  # the bias moved it, and left the log-probabilities alone
        assert [token for token, _ in ranked[0].top] == logps[0].topk(5).indices.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in ranked[0].top]), logps[0].topk(5).values, atol=1e-4, rtol=0)
        ended = await said("stop", temperature=0, tokens=40, stop=frozenset({text[3]}))
        at = text.index(text[3])
        assert [token.id for token in ended] == text[: at + 1]
        assert ended[-1].finish == "stop"
        seeded = [await said(f"seed{i}", tokens=20, seed=11) for i in range(2)]
        assert [token.id for token in seeded[0]] == [token.id for token in seeded[1]] != [token.id for token in await said("x", seed=12)]
        for keys in ({"temperature": 3.0}, {"presence_penalty": 5.0}):
            with pytest.raises(ConfigError, match="does not have this sampling"):
                await said("refused", **keys)

    use(go)


def test_probes_hold_up_to_one_number_a_prompt(use: Run, tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    async def go(engine: LiveEngine) -> None:
        await load_all(engine, adapters)
        model: Any = PeftModel.from_pretrained(load_base(Model(path=str(tiny_model_dir), dtype="fp32")), adapters[DIGESTS[3]])
        probes = record(model.eval(), AutoTokenizer.from_pretrained(tiny_model_dir), model.disable_adapter)
        assert engine.gives_logprobs and engine.precision == "fp32"
        bare = torch.stack([torch.as_tensor(row) for row in await engine.next_logits(probes.prompts)])
        for digest in DIGESTS:
            tuned = torch.stack([torch.as_tensor(row) for row in await engine.next_logits(probes.prompts, digest)])
            report = compare(probes, tuned, bare, "fp32", "cpu", logprobs=True)
            assert report.passed is (digest == DIGESTS[3]), report.reason

    use(go)


def test_what_vllm_would_leave_out_is_refused_at_load(use: Run, adapters: dict[str, Path], tmp_path: Path) -> None:
    def configured(**keys: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
        return lambda config, tensors: config.update(keys)

    def deeper(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)

    def wide(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.cat([tensor] * 16, dim=int("lora_B" in name))
        config["r"] *= 16

    cases = {
        "DoRA": configured(use_dora=True), "whole modules": configured(modules_to_save=["lm_head"]), "biases": configured(bias="all"),
        "no linear layer of this base": deeper, "rank is 32": wide,
    }  # fmt: skip

    async def go(engine: LiveEngine) -> None:
        before = set(engine.stats().adapters)
        for number, (reason, change) in enumerate(cases.items()):
            folder = spoiled(adapters[DIGESTS[0]], tmp_path / str(number), change)
            with pytest.raises((ModelError, IntegrityError), match=reason):
                await engine.load_adapter(f"{number:f>64}", folder)
        assert set(engine.stats().adapters) == before
        await engine.health()

    use(go)


def test_more_adapters_than_it_may_hold_are_refused_and_harm_nobody(use: Run, adapters: dict[str, Path], truth: Truth) -> None:
    async def go(engine: LiveEngine) -> list[tuple[Request, list[Token]]]:
        await load_all(engine, adapters)
        more = [f"{number:e>64}" for number in range(3)]
        came = await asyncio.gather(*(engine.load_adapter(digest, adapters[DIGESTS[0]]) for digest in more), return_exceptions=True)
        assert [isinstance(each, ModelError) and "as many adapters as it may" in str(each) for each in came] == [False, False, True]
        requests = [some_request(random.Random(i), i, digest, max_tokens=4) for i, digest in enumerate(DIGESTS)]
        answers = await asyncio.gather(*(answer(engine, request) for request in requests))
        for digest in more[:2]:
            await engine.unload_adapter(digest)
        return list(zip(requests, answers, strict=True))

    for request, tokens in use(go):
        require_own(truth, request, tokens)


@pytest.mark.parametrize("num", [60, pytest.param(1000, marks=pytest.mark.proof)])
def test_every_constrained_answer_is_valid(use: Run, adapters: dict[str, Path], tokenizer: PreTrainedTokenizerBase, num: int) -> None:
    """Half may end with another token than the tokenizer's own, some with that one alone: vLLM knows no other."""
    eos, other = tokenizer.eos_token_id, tokenizer.pad_token_id
    requests, mades = some_requests(tokenizer, num, seed=num)
    stops = [frozenset({eos}), frozenset({other}), frozenset({eos, other})]
    requests = [replace(each, stop_ids=stops[i % 3], sampling=replace(each.sampling, num_logprobs=None)) for i, each in enumerate(requests)]

    async def go(engine: LiveEngine) -> list[list[Token]]:
        await load_all(engine, adapters)
        return await asyncio.gather(*(answer(engine, request) for request in requests))

    answers = use(go)
    for made, tokens in zip(mades, answers, strict=True):
        assert tokens[-1].finish == "stop", (made, tokens[-1])
        require_valid(made, text_of(tokenizer, tokens))
    assert {tokens[-1].id for tokens in answers} == {eos, other}
    assert len({text_of(tokenizer, tokens) for tokens in answers}) > num / 2, "the answers hardly differ: this shows nothing"


def test_an_answer_that_cannot_go_on_ends_with_the_reason_and_harms_nobody(use: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """What vLLM would follow without end, or ends as if it were complete, or answers to another constraint."""
    stops = frozenset({tokenizer.eos_token_id})
    slow, digits, more, letters = compiled(
        tokenizer, *(regex_constraint(each, "") for each in ("[a-z]{50}", "[0-9]{9}", "[0-9]{12}", "[a-z]{9}"))
    )
    wrong = {
        "too slow to follow": SlowGrammar(slow.constraint, slow._matcher, slow._vocabulary),
        "to its end": Grammar(digits.constraint, more._matcher, more._vocabulary),
        "left its constraint": Grammar(letters.constraint, digits._matcher, digits._vocabulary),
    }

    async def go(engine: LiveEngine) -> tuple[list[list[Token]], list[Token]]:
        bad = [Request(f"bad{i}", (5, 6), "", 60, stops, constraint=grammar) for i, grammar in enumerate(wrong.values())]
        *ends, good = await asyncio.gather(
            *(answer(engine, each) for each in [*bad, Request("good", (5, 6), "", 60, stops, constraint=digits)])
        )
        for name, num_logprobs in (("a", 0), ("b", 3)):
            with pytest.raises(ConfigError, match="no log-probabilities of constrained answers"):
                await answer(engine, replace(bad[0], id=name, sampling=Sampling(num_logprobs=num_logprobs)))
        return ends, good

    ends, good = use(go)
    for reason, tokens in zip(wrong, ends, strict=True):
        assert tokens[-1].finish == "abort" and reason in tokens[-1].problem, tokens[-1]
    assert good[-1].finish == "stop" and text_of(tokenizer, good).isdigit()


def test_hostile_constraints_are_followed_or_ended_and_the_engine_goes_on(use: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    stops = frozenset({tokenizer.eos_token_id})
    grammars = compiled(
        tokenizer,
        *(
            regex_constraint(made, "") if isinstance(made, str) else json_constraint(made, "")
            for made, refusal in HOSTILE.values()
            if not refusal
        ),
    )

    async def go(engine: LiveEngine) -> list[list[Token]]:
        requests = [Request(f"h{i}", (5, 6), "", 100, stops, constraint=grammar) for i, grammar in enumerate(grammars)]
        return await asyncio.gather(*(answer(engine, request) for request in requests))

    for tokens in use(go):
        assert tokens[-1].finish in ("stop", "length") or "too" in tokens[-1].problem, tokens[-1]


def test_a_dead_engine_says_so(use: Run, tiny_model_dir: Path) -> None:
    """The last test: it kills vLLM's process."""

    async def go(engine: LiveEngine) -> None:
        stream = engine.generate(Request("a", (5, 6), max_tokens=250))
        await anext(stream)
        for process in psutil.Process().children(recursive=True):
            if "EngineCore" in " ".join(process.cmdline()):
                process.kill()
        assert [token async for token in stream][-1].finish == "abort"
        for asked in (engine.health(), answer(engine, Request("b", (5, 6))), engine.next_logits([[5, 6]])):
            with pytest.raises(EngineEnded, match="has ended"):
                await asked

    use(go)
