"""Invariants: what must not change a result, tried on the user's own model, data, method and backend: packing, accumulation, the number of
workers, a stop, a save, a merge.

In: a recipe, its prepared blocks, a scratch folder. Out: one Finding a check, with the number. Runs in: this process, and processes of one
group on this machine where several workers are tried. Nothing is written outside the scratch folder.

A baseline run of a few steps on a few shortened blocks is repeated with the work cut another way; the mean losses of all steps must agree.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from ftcore.backends.base import World
from ftcore.bind import bind_adapter
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import Block
from ftcore.errors import FtcoreError, Interrupted
from ftcore.journal import read_lines
from ftcore.loop import Blocks, Training, train
from ftcore.models import load_base
from ftcore.probes import ABSOLUTE, SHARE, Probes, check, last_logits
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 5e-3, "bf16": 1e-2}
"""Largest difference of a step's mean loss. What half precision rounds hides small faults: model.dtype=fp32 looks closer."""
WINDOW, NUM_BLOCKS, SEGMENTS = 6, 12, 4
"""Blocks a step and in all; segments kept of each packed block."""
GROUP_TIMEOUT_S = 300
Log = Callable[[str], None]
Outcome = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Finding:
    """One line: what was tried, the number, the tolerance for this precision."""

    check: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.outcome}  {self.check:<28} {self.text}"


@dataclass
class FewBlocks:
    """A few blocks held in memory, so that other processes get the very same."""

    blocks: tuple[Block, ...]
    digest: str

    def num_blocks(self, split: str) -> int:
        return len(self.blocks) if split == "train" else 0

    def block_lengths(self, split: str) -> np.ndarray:
        return np.array([block.num_tokens for block in self.blocks] if split == "train" else [], np.int64)

    def block(self, split: str, index: int) -> Block:
        return self.blocks[index]


def few_blocks(prepared: Blocks, num_tokens: int, *, packs: bool) -> FewBlocks:
    """A few blocks of the training split, each of at most `num_tokens`: whole blocks cut, or several of their segments laid end to end.

    Of each segment its end is kept, where the answers are.
    """
    found: list[Block] = []
    for index in range(min(NUM_BLOCKS, prepared.num_blocks("train"))):
        block = prepared.block("train", index)
        kept = range(len(block.lengths)) if not packs else range(min(len(block.lengths), SEGMENTS))
        found.append(_joined([(block, number) for number in kept], num_tokens))
    if packs:  # rows nearly as long as a block leave one segment in each; what packing could spoil needs two
        found = [_joined([(other, 0) for other in (block, found[index - 1])], num_tokens) if len(block.lengths) == 1 else block
                 for index, block in enumerate(found)]  # fmt: skip
    return FewBlocks(tuple(found), prepared.digest)


def _joined(segments: list[tuple[Block, int]], num_tokens: int) -> Block:
    room, ids, mask, rows = num_tokens // len(segments), [], [], []
    for block, number in segments:
        high = int(block.lengths[: number + 1].sum())
        low = max(high - room, high - int(block.lengths[number]))
        ids.append(block.ids[low:high])
        mask.append(block.mask[low:high])
        rows.append(block.rows[number])
    lengths = np.array([len(part) for part in ids], np.int32)
    return Block(ids=np.concatenate(ids), mask=np.concatenate(mask), lengths=lengths, rows=np.array(rows))


class Bench:
    """The runs that checks compare; each under its own name in the scratch folder."""

    def __init__(self, recipe: Recipe, blocks: FewBlocks, scratch: Path, steps: int, log: Log) -> None:
        self.recipe, self.blocks, self.scratch, self.steps, self.log = recipe, blocks, scratch, steps, log
        self.on_gpu = recipe.resources.gpus_per_worker > 0 and torch.cuda.is_available()
        self.smallest = 1 if recipe.backend.kind == "plain" else 2
        self.packs = recipe.data.pack and recipe.stage.packs
        self.dropout = float(recipe.method.model_dump().get("dropout", 0.0))
        self.tolerance = TOLERANCE[recipe.model.dtype]
        self.started = time.monotonic()

    def small(self, name: str, *, dropout: bool = False, micro_batch: int = 1, padded: bool = False) -> Recipe:
        """The user's recipe, `steps` long, with its dropout or without, the work cut as asked."""
        recipe = self.recipe
        optim = {"batch_size": WINDOW, "max_steps": self.steps, "warmup": 0.0}
        output = {"runs": str(self.scratch), "store": str(self.scratch / "store"), "checkpoint_every": 10**6, "log_every": 1, "loggers": ()}
        changes = {
            "name": name, "optim": recipe.optim.model_copy(update=optim), "output": recipe.output.model_copy(update=output),
            "backend": recipe.backend.model_copy(update={"micro_batch": micro_batch}),
            "model": recipe.model.model_copy(update={"adapter": None} | ({"attention": "sdpa"} if padded else {})),
            "data": recipe.data.model_copy(update={"pack": False} if padded else {}),
        }  # fmt: skip
        if self.dropout and not dropout:
            changes["method"] = recipe.method.model_copy(update={"dropout": 0.0})
        return recipe.model_copy(update=changes)

    def losses(self, recipe: Recipe, size: int | None = None, stop_after: int | None = None) -> list[float]:
        """Trains in `size` processes (the fewest that the backend takes); the mean loss of every step."""
        size = size or self.smallest
        self.log(f"  {recipe.name}: {self.steps} steps, {size} worker{'s' * (size > 1)} ({time.monotonic() - self.started:.0f} s)")
        place = "cuda" if self.on_gpu else "cpu"
        if size == 1:
            _train(recipe, World(device=place), self.blocks, stop_after)
        else:
            order = (size, dump_recipe(recipe), recipe.plugins, self.blocks, stop_after, place)
            with (
                tempfile.TemporaryDirectory() as store,
                ProcessPoolExecutor(size, mp_context=_forkserver()) as processes,
            ):
                futures = [processes.submit(_rank, rank, f"file://{store}/store", *order) for rank in range(size)]
                for future in futures:
                    future.result()
        gc.collect()
        return [line["loss"] for line in read_lines(RunDir(self.scratch, recipe.name)) if "loss" in line]

    def too_many(self, size: int) -> str:
        """Why `size` workers cannot be tried here; empty when they can."""
        if self.on_gpu and torch.cuda.device_count() < size:
            return f"{size} workers need as many GPUs; here are {torch.cuda.device_count()}"
        return ""


def _forkserver() -> BaseContext:
    """Workers are forked from a process that has the imports behind it and nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _train(recipe: Recipe, world: World, blocks: FewBlocks, stop_after: int | None) -> None:
    seen: list[object] = []
    try:
        train(recipe, world, blocks, RunDir(recipe.output.runs, recipe.name), seen.append, lambda: len(seen) + 1 == stop_after)
    except Interrupted:
        if stop_after is None:
            raise


def _rank(
    rank: int, store: str, size: int, recipe: str, plugins: tuple[str, ...], blocks: FewBlocks, stop_after: int | None, place: str
) -> None:
    """One worker of a group on this machine, in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = f"cuda:{rank}" if place == "cuda" else "cpu"
    if place == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("nccl" if place == "cuda" else "gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    try:
        _train(parse_recipe(recipe, plugins=plugins), World(rank, size, rank, device), blocks, stop_after)
    finally:
        dist.destroy_process_group()


def invariants(
    recipe: Recipe, prepared: Blocks, scratch: Path, *, steps: int = 4, num_tokens: int = 512, only: str = "", log: Log = print
) -> list[Finding]:
    """Tries every invariance in turn (or those whose name holds `only`); a Finding each.

    Raises the run's own FtcoreError when the recipe does not even train.
    """
    blocks = few_blocks(prepared, num_tokens, packs=recipe.data.pack and recipe.stage.packs)
    bench = Bench(recipe, blocks, scratch, steps, log)
    noisy = _base_dropout(recipe)
    found: list[Finding] = []
    log(f"  {len(bench.blocks.blocks)} blocks of at most {num_tokens} tokens, {WINDOW} a step, {recipe.model.dtype}")
    baseline = bench.losses(bench.small("baseline"))
    if len(baseline) != steps or not all(np.isfinite(baseline)):
        found.append(Finding("baseline", "FAIL", f"{len(baseline)} losses of {steps} steps, {baseline}"))
    for name, attempt in _cuts(bench):
        if only not in name:
            continue
        found.append(Finding(name, "SKIP", noisy) if noisy else _guarded(name, partial(_compared, bench, name, baseline, attempt)))
        log(str(found[-1]))
    for name, tried in (("checkpoint -> resume", _resumed), ("save -> reload", _reloaded), ("merged = adapter on base", _merged)):
        if only in name:
            found.append(_guarded(name, partial(tried, bench, name, baseline)))
            log(str(found[-1]))
    return found


Attempt = Callable[[], tuple[list[float], str]]


def _cuts(bench: Bench) -> Iterator[tuple[str, Attempt]]:
    """The ways to cut the same work, by the check they belong to."""

    def padded() -> tuple[list[float], str]:
        if not bench.packs:
            return [], "data.pack is off, or the stage never packs"
        return bench.losses(bench.small("unpacked", padded=True)), "each segment a padded row of its own"

    def whole() -> tuple[list[float], str]:
        return bench.losses(
            bench.small("accumulation", micro_batch=WINDOW // bench.smallest)
        ), f"micro_batch 1 and {WINDOW // bench.smallest}"

    def workers(size: int) -> tuple[list[float], str]:
        if reason := bench.too_many(size):
            return [], reason
        return bench.losses(bench.small(f"workers-{size}"), size), "in processes on this machine"

    yield "packed = unpacked", padded
    yield "accumulation", whole
    for size in range(bench.smallest + 1, 4):
        yield f"{bench.smallest} = {size} workers", partial(workers, size)


def _compared(bench: Bench, name: str, baseline: list[float], attempt: Attempt) -> Finding:
    losses, note = attempt()
    if not losses:
        return Finding(name, "SKIP", note)
    off = " (dropout set to 0)" if bench.dropout else ""
    return _judged(name, _spread(baseline, losses), bench.tolerance, f"{note}{off}", bench.recipe.model.dtype)


def _guarded(name: str, tried: Callable[[], Finding]) -> Finding:
    """A check that cannot even run has failed, and says why; the others go on."""
    try:
        return tried()
    except FtcoreError as error:
        return Finding(name, "FAIL", f"{error.what}: {error.got}" if error.got else error.what)
    except Exception as error:  # somebody's own method or stage may raise anything; the other checks still have something to say
        return Finding(
            name, "FAIL", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        )


def _judged(name: str, value: float, tolerance: float, note: str, dtype: str, what: str = "losses") -> Finding:
    same = "identical" if value == 0 else f"differ by {value:.2g}"
    return Finding(name, "PASS" if value <= tolerance else "FAIL", f"{what} {same}, allowed {tolerance:.2g} in {dtype}: {note}")


def _spread(one: list[float], other: list[float]) -> float:
    if len(one) != len(other):
        return float("inf")
    difference = np.abs(np.array(one) - np.array(other))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def _resumed(bench: Bench, name: str, baseline: list[float]) -> Finding:
    """With the user's own dropout: a resumed run draws what it would have drawn."""
    whole = bench.losses(bench.small("uninterrupted", dropout=True)) if bench.dropout else baseline
    recipe = bench.small("stopped", dropout=True)
    bench.losses(recipe, stop_after=max(1, bench.steps // 2))
    losses = bench.losses(recipe)
    exact = bench.recipe.backend.kind == "plain" and (not bench.on_gpu or bench.recipe.backend.deterministic)
    note = f"stopped after step {max(1, bench.steps // 2)} and gone on" + (f" (dropout {bench.dropout:g} on)" if bench.dropout else "")
    return _judged(name, _spread(whole, losses), 0.0 if exact else min(bench.tolerance, 1e-5), note, bench.recipe.model.dtype)


def _reloaded(bench: Bench, name: str, baseline: list[float]) -> Finding:
    """The trained model in memory against its checkpoint in a fresh one, and against its result as plain PEFT reads it."""
    recipe, passed, notes = bench.small("reloaded"), True, []
    if bench.smallest == 1:
        bench.log("  reloaded: trained, and restored into a fresh model")
        trained, restored = _live_logits(bench, recipe)
        worst = float((trained - restored).abs().max())
        limit = ABSOLUTE if recipe.model.dtype in ("fp32", "fp64") else 0.02 * float(trained.abs().max())
        passed = worst <= limit
        notes.append(f"checkpoint in a fresh model {worst:.2g}, allowed {limit:.2g}")
    if recipe.method.is_adapter:
        final = bench.scratch / "baseline" / "final"
        device = "cuda" if bench.on_gpu else "cpu"
        tuned = bind_adapter(load_base(recipe.model, recipe.method, device=device), final)
        held = recipe.method.held(recipe.model.dtype)
        report = check(tuned, load_tokenizer(recipe.model), Probes.load(final), held, tuned.disable_adapter)
        passed = passed and report.passed  # each by its own limit: the model's 2 % would hide a wrong adapter
        notes.append(f"adapter through plain PEFT {report.max_abs_error:.2g}, allowed {report.limit:.2g}")
    if not notes:
        return Finding(name, "SKIP", f"backend `{recipe.backend.kind}` has no whole model in one process; see checkpoint -> resume")
    return Finding(name, "PASS" if passed else "FAIL", f"logits differ in {recipe.model.dtype}: {'; '.join(notes)}")


def _live_logits(bench: Bench, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[P, vocab] of a model just trained, and of one restored from the checkpoint it made."""
    prompts = [block.ids[: min(32, int(block.lengths[0]))].tolist() for block in bench.blocks.blocks[:4]]
    world, run = World(device="cuda" if bench.on_gpu else "cpu"), RunDir(bench.scratch, recipe.name)
    found = []
    for _ in range(2):
        training = Training(recipe, world, bench.blocks, run, None, None)
        try:
            training.restore()
            training.run_steps()  # nothing is left to do the second time
            found.append(last_logits(training.model, prompts))
        finally:
            training.close()
        del training
        gc.collect()
    return found[0], found[1]


def _merged(bench: Bench, name: str, baseline: list[float]) -> Finding:
    """In fp32 over the full-precision base, whatever it was trained on."""
    method, final = bench.recipe.method, bench.scratch / "baseline" / "final"
    if not method.is_adapter:
        return Finding(name, "SKIP", f"method `{method.kind}` makes a whole model: nothing to merge")
    probes = Probes.load(final)
    tuned = bind_adapter(load_base(bench.small("merged").model, dtype="fp32"), final)
    with_adapter = last_logits(tuned, probes.prompts)
    with tuned.disable_adapter():
        effect = float((with_adapter - last_logits(tuned, probes.prompts)).abs().max())
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        return Finding(name, "SKIP", f"PEFT does not merge this kind of adapter: {str(error).splitlines()[0][:120]}")
    worst = float((with_adapter - last_logits(merged, probes.prompts)).abs().max())
    return _judged(name, worst, min(ABSOLUTE, SHARE * effect), f"the adapter's own effect is {effect:.2g}", "fp32", "logits")


def _base_dropout(recipe: Recipe) -> str:
    """Why cutting the work otherwise must change the losses: the base's own config drops activations while training."""
    facts = AutoConfig.from_pretrained(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code).to_dict()
    drops = {key: value for key, value in facts.items() if key.endswith(("dropout", "pdrop")) and isinstance(value, float) and value > 0}
    return f"the base's own config has dropout ({', '.join(f'{key} {value:g}' for key, value in drops.items())})" if drops else ""
