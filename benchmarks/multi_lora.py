"""Many adapters in one batch: tokens/s of the torch engine against plain PEFT, with the same threads, on a model made on the spot.

    python benchmarks/multi_lora.py [--layers 12] [--hidden 768] [--rows 16] [--tokens 32] [--dtype fp32] [--threads 1]

PEFT mixed: one `generate` of the whole batch with `adapter_names` (its loop over adapters). PEFT swap: `set_adapter` and a batch of one
request after another. Every figure is the median of `--rounds` rounds, the systems taking turns. Then one decode step of the engine over
the model's bare linear layers at this batch, which it cannot do without; and 8 adapters drawn anew each round from 8 to 256 resident ones.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # a benchmark runs from anywhere, so what it imports of ours comes after this

import torch  # noqa: E402

from ftcore.batching import Row, Step  # noqa: E402
from ftcore.engines.base import LiveEngine, Request, Sampling  # noqa: E402
from ftcore.engines.torch import Torch  # noqa: E402
from ftcore.lean_imports import LoraConfig, PeftModel, get_peft_model  # noqa: E402


def make_base(folder: Path, layers: int, hidden: int, vocabulary: int) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapters(base: Path, home: Path, count: int, rank: int) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    found = {}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, config)
    for number in range(count):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        digest = f"{number + 1:064x}"
        model.save_pretrained(home / digest[-4:])
        found[digest] = home / digest[-4:]
    return found


def step_over_linears(engine: LiveEngine, base: Path, rows: int, digests: list[str], rounds: int) -> dict[str, float]:
    """Seconds of the bare linear layers alone, head included, and of one decode step, by adapters; the engine is idle meanwhile."""
    from transformers import AutoModelForCausalLM

    decoder = engine._thread.decoder  # type: ignore[attr-defined]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=decoder.dtype)
    linears = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {module.in_features: torch.randn(rows, module.in_features, dtype=decoder.dtype) for module in linears}

    def bare() -> None:
        for module in linears:
            module(inputs[module.in_features])

    def step(adapters: list[str]) -> Callable[[], None]:
        held = [Row(Request("", (5,), digest), 512, [5] * 40, num_cached=39, place=place) for place, digest in enumerate(adapters)]
        return lambda: decoder.step(Step(held, []))

    lora, active = decoder.lora, set[str]()
    for digest in digests:
        adapter = engine._thread.adapters[digest]  # type: ignore[attr-defined]
        lora.activate(digest, adapter.rank, adapter.updates, active)
        active.add(digest)
    works = {"bare linears": bare, "step, base only": step([""] * rows), "step, 1 adapter": step(digests[:1] * rows)}
    works[f"step, {rows} adapters"] = step(digests)
    found: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for turn in range(8 * rounds):
            for name, work in works.items():
                started = time.perf_counter()
                work()
                if turn:
                    found[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in found.items()}


def residents(base: Path, adapters: dict[str, Path], args: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> dict[int, float]:
    """Tokens/s of 8 adapters among the rows, drawn from so many resident ones."""
    rng, speeds, engines = random.Random(0), dict[int, list[float]](), {}
    for count in (8, 64, 256):
        engines[count] = engine = loop.run_until_complete(section_of(args).open(str(base)))
        for digest, path in list(adapters.items())[:count]:
            loop.run_until_complete(engine.load_adapter(digest, path))
    for turn in range(2 * args.rounds + 1):
        for count, engine in engines.items():
            drawn = rng.sample(list(adapters)[:count], 8)
            speed = Ours(engine, loop, args.prompt, args.tokens)([drawn[row % 8] for row in range(args.rows)])
            if turn:
                speeds.setdefault(count, []).append(speed)
    for engine in engines.values():
        loop.run_until_complete(engine.close())
    return {count: statistics.median(each) for count, each in speeds.items()}


def section_of(args: argparse.Namespace) -> Torch:
    return Torch(max_batch=args.rows, max_context=512, num_threads=args.threads, dtype=args.dtype, prefix_mib=0)


class Ours:
    """The engine, with all adapters loaded."""

    def __init__(self, engine: LiveEngine, loop: asyncio.AbstractEventLoop, prompt: int, tokens: int) -> None:
        self._engine, self._loop, self._prompt, self._tokens, self._count = engine, loop, prompt, tokens, 0

    def __call__(self, adapters: list[str]) -> float:
        return self._loop.run_until_complete(self._round(adapters))

    async def _round(self, adapters: list[str]) -> float:
        async def one(row: int, digest: str) -> None:
            self._count += 1
            prompt = tuple((7 * row + 13 * self._count + i) % 997 + 3 for i in range(self._prompt))
            sampling = Sampling(temperature=0)
            async for _ in self._engine.generate(Request(f"b{self._count}", prompt, digest, self._tokens, sampling=sampling)):
                pass

        started = time.perf_counter()
        await asyncio.gather(*(one(row, digest) for row, digest in enumerate(adapters)))
        return len(adapters) * self._tokens / (time.perf_counter() - started)


class Peft:
    """Plain PEFT with every adapter loaded."""

    def __init__(self, base: Path, adapters: dict[str, Path], args: argparse.Namespace, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._prompt, self._tokens = args.prompt, args.tokens
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        for digest, folder in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=digest)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=digest)
        self._model = model.to(dtype).eval()

    def mixed(self, adapters: list[str]) -> float:
        ids = torch.randint(3, 999, (len(adapters), self._prompt))
        names = [digest or "__base__" for digest in adapters]
        return self._timed(len(adapters), lambda: self._generate(ids, adapter_names=names))

    def swap(self, adapters: list[str]) -> float:
        def all_rows() -> None:
            for digest in adapters:
                self._model.set_adapter(digest)
                self._generate(torch.randint(3, 999, (1, self._prompt)))

        return self._timed(len(adapters), all_rows)

    def _generate(self, ids: torch.Tensor, **keys: Any) -> None:
        self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self._tokens, min_new_tokens=self._tokens,
            pad_token_id=0, **keys,
        )  # fmt: skip

    def _timed(self, rows: int, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            work()
        return rows * self._tokens / (time.perf_counter() - started)


def in_turn(cases: dict[str, tuple[Callable[[list[str]], float], list[str]]], num_rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each case in each round, one case after another so that a slow minute meets them all; one round before warms up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(num_rounds + 1):
        for name, (work, rows) in cases.items():
            speed = work(rows)
            if turn:
                found[name].append(speed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 12, "hidden": 768, "vocabulary": 8192, "rows": 16, "prompt": 16, "tokens": 32, "rank": 8, "rounds": 3, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    with tempfile.TemporaryDirectory(prefix="multi-lora-") as folder:
        base = make_base(Path(folder) / "base", args.layers, args.hidden, args.vocabulary)
        adapters = make_adapters(base, Path(folder), max(args.rows, 256), args.rank)
        digests = list(adapters)[: args.rows]
        loop, rows = asyncio.new_event_loop(), args.rows
        bare, engine = (loop.run_until_complete(section_of(args).open(str(base))) for _ in range(2))
        for digest in digests:
            loop.run_until_complete(engine.load_adapter(digest, adapters[digest]))
        ours, peft = Ours(engine, loop, args.prompt, args.tokens), Peft(base, {each: adapters[each] for each in digests}, args, dtype)
        cases: dict[str, tuple[Callable[[list[str]], float], list[str]]] = {
            "engine without adapters": (Ours(bare, loop, args.prompt, args.tokens), [""] * rows),
            "engine, base rows": (ours, [""] * rows),
            "engine, 1 adapter": (ours, digests[:1] * rows),
            "engine, 4 adapters": (ours, [digests[i % 4] for i in range(rows)]),
            f"engine, {rows} adapters": (ours, digests),
            f"PEFT mixed, {rows} adapters": (peft.mixed, digests),
            f"PEFT swap, {rows} adapters": (peft.swap, digests),
        }
        found = in_turn(cases, args.rounds)
        speeds = {name: statistics.median(each) for name, each in found.items()}
        steps = step_over_linears(engine, base, rows, digests, args.rounds)
        for each in (bare, engine):
            loop.run_until_complete(each.close())
        del peft, ours, bare, engine
        drawn = residents(base, adapters, args, loop)
    report(speeds, steps, drawn, args)
    return 0


def report(speeds: dict[str, float], steps: dict[str, float], drawn: dict[int, float], args: argparse.Namespace) -> None:
    many = speeds[f"engine, {args.rows} adapters"]
    print(f"{'':28}{'tokens/s':>9}{f'{args.rows} adapters are':>18}   ({args.rows} rows, {args.threads} threads, {args.dtype})")
    for name, speed in speeds.items():
        print(f"{name:28}{speed:9.0f}{many / speed:17.2f}x")
    print(f"1 adapter over base rows {speeds['engine, 1 adapter'] / speeds['engine, base rows']:.2f}, ", end="")
    print(f"base rows over an engine without adapters {speeds['engine, base rows'] / speeds['engine without adapters']:.2f}")
    print(f"\n{'':28}{'ms':>9}{'over the linears':>18}")
    for name, seconds in steps.items():
        print(f"{name:28}{seconds * 1e3:9.1f}{seconds / steps['bare linears']:17.2f}x")
    print(f"\n{'8 adapters of':28}{'tokens/s':>9}{'over 8 of 8':>18}")
    for count, speed in drawn.items():
        print(f"{f'{count} resident':28}{speed:9.0f}{speed / drawn[8]:17.2f}x")


if __name__ == "__main__":
    sys.exit(main())
