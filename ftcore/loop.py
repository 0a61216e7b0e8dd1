"""The one training loop: five hooks (models, experience, weight, loss, after_step) and no `if kind ==`.

In: a recipe, this process's World, prepared blocks, the run's folder. Out: a sealed `final/` and the figures of the run.
Runs in: train workers, one call on every rank; or a single plain process.

    window of blocks -> micro-batches of this rank -> sum of losses / global weight -> reduced gradients -> one update
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ftcore.backends.base import World
from ftcore.checkpoint import CheckpointWriter, Position, read_position
from ftcore.data.collate import Batch, collate
from ftcore.data.order import Order, deal, step_seed
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import Block
from ftcore.errors import IntegrityError, Interrupted, TrainingError
from ftcore.journal import Journal
from ftcore.models import DTYPES, CausalModel, autocast_dtype, choose_layout, load_base
from ftcore.probes import IN_FP32, Probes, is_exact, record
from ftcore.recipe import Recipe, recipe_digest
from ftcore.rehearsal import heaviest_step, naming_the_forecast
from ftcore.rundir import RunDir, checkpoint_key
from ftcore.storage import verify

log = logging.getLogger(__name__)
Progress = Callable[[dict[str, Any]], None]


class Blocks(Protocol):
    """What the loop reads of prepared data (see data.prepared.Prepared)."""

    digest: str

    def num_blocks(self, split: str) -> int: ...
    def block_lengths(self, split: str) -> np.ndarray: ...
    def block(self, split: str, index: int) -> Block: ...


@dataclass(frozen=True)
class Trained:
    """What a run came to. `chosen_step` is the checkpoint that `final/` was made of."""

    steps: int
    chosen_step: int
    metrics: dict[str, Any]
    world_size: int
    already_finished: bool = False


def train(
    recipe: Recipe,
    world: World,
    prepared: Blocks,
    run: RunDir,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Trained:
    """Trains to the end, from the newest sound checkpoint if there is one.

    `on_progress` gets every journal line on rank 0. `should_stop` is asked after each step on every rank; when any says yes a checkpoint is
    made and Interrupted raised. Raises TrainingError when the loss is not finite, StorageError when a checkpoint cannot be written.
    """
    if run.is_finished():
        return replace(read_result(run), already_finished=True)
    training = Training(recipe, world, prepared, run, on_progress, should_stop)
    try:
        training.restore()
        with naming_the_forecast(recipe, lambda: training.at.step):
            training.rehearse()
            training.run_steps()
        return training.finish()
    finally:
        training.close()


def read_result(run: RunDir) -> Trained:
    return Trained(**json.loads(run.folder.read("final/result.json")))


class Training:
    """One rank's part in a run, from the first step or a restored one to the sealed result."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        prepared: Blocks,
        run: RunDir,
        on_progress: Progress | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.recipe, self.world, self.prepared, self.run = recipe, world, prepared, run
        self.on_progress, self.should_stop = on_progress, should_stop or (lambda: False)
        optim, model = recipe.optim, recipe.model
        self.order = Order(prepared.num_blocks("train"), optim.batch_size, optim.seed)
        self.num_steps = self.order.num_steps(optim.epochs, optim.max_steps)
        self.sizes = {split: np.asarray(prepared.block_lengths(split)) for split in ("train", "validation")}
        self.tokenizer = load_tokenizer(model)
        with recipe.backend.loading(DTYPES[model.dtype], world):
            base = load_base(model, recipe.method, device=world.device)
            seed_all(optim.seed)
            self.model: nn.Module = recipe.method.apply(base)
        if model.adapter is not None:
            with run.opened("parent") as folder:
                recipe.method.load(self.model, folder)
        self.stepper = recipe.backend.open(self.model, optim, self.num_steps, world, autocast_dtype(model.dtype))
        packs = recipe.data.pack and recipe.stage.packs
        self.layout = self.stepper.run(lambda: choose_layout(base, model.attention, packs=packs))
        policy = self.stepper.run(lambda: CausalModel(self.model, self.layout))
        self.models = recipe.stage.models(policy, recipe.method, self.model)
        self.writer = CheckpointWriter(run, recipe.output.keep)
        self.journal: Journal | None = None
        self.at = Position(recipe=recipe_digest(recipe), world_size=world.size, prepared=prepared.digest)

    def restore(self) -> None:
        """Goes on from the newest sealed and verified checkpoint; rank 0 finds it, so that all ranks take the same."""
        found = (self.run.newest_checkpoint(log.warning) or 0) if self.world.is_main else 0
        step = int(self.stepper.reduce([float(found)])[0])
        if step:
            with self.run.opened(checkpoint_key(step)) as folder:
                self.stepper.load(self.recipe.method, folder)
                self.at = replace(read_position(folder), world_size=self.world.size)
            if self.at.prepared != self.prepared.digest:
                raise TrainingError(
                    "the data changed since this run's checkpoint",
                    where=self.run.url,
                    got=self.prepared.digest[:12],
                    wanted=self.at.prepared[:12],
                    remedy="give the run another name, or put the data back",
                )
        if self.world.is_main:
            self._warn_of_a_damaged_best()
            self.run.sweep()
            self.journal = Journal(self.run, step)
            self.writer.before = self.journal.flush
            log.info("starting at step %d of %d", step, self.num_steps)

    def rehearse(self) -> None:
        """Forward and backward over the heaviest micro-batch that is to come, and nothing of it is kept; random numbers are set anew by
        each step."""
        steps = range(self.at.step, self.at.step if self._is_stale() else self.num_steps)
        micro_batch = self.recipe.backend.micro_batch
        step = heaviest_step(self.order, self.sizes["train"], steps, micro_batch, padded=self.layout == "padded")
        if step is None:
            return
        self.model.train()
        [batch] = self.recipe.stage.experience(self.models, self._window(step)[:1])
        self.stepper.rehearse(lambda: self.recipe.stage.loss(self.models, batch).total, scale=1 / max(self.recipe.stage.weight(batch), 1.0))

    def run_steps(self) -> None:
        while self.at.step < self.num_steps and not self._is_stale():
            stop = self._step()
            step = self.at.step
            validated = self._is_validation_step(step) and self._validate()
            over = step == self.num_steps or self._is_stale()
            if over or stop or step % self.recipe.output.checkpoint_every == 0 or (validated and self.at.best_step == step):
                self.writer.save(self.at, self.recipe.method, self.stepper, is_main=self.world.is_main)
            if stop and not over:
                self._settle()
                raise Interrupted(
                    f"stopped at step {step} of {self.num_steps}", where=self.run.url, remedy="run the same command again to go on"
                )
        if self._is_stale():
            log.info("no better validation loss for %d validations: stopping at step %d", self.at.stale, self.at.step)
        self._settle()
        if self.journal:
            self.journal.flush()

    def _is_stale(self) -> bool:
        patience = self.recipe.eval.patience
        return patience is not None and self.at.stale >= patience

    def _settle(self) -> None:
        """Every rank waits until rank 0's checkpoint is sealed: the first process to leave takes the others with it."""
        self.writer.wait()
        self.stepper.reduce([0.0])

    def _step(self) -> bool:
        """One optimizer step. Returns whether any rank was asked to stop."""
        started, step, world = time.perf_counter(), self.at.step, self.world
        seed_all(step_seed(self.recipe.optim.seed, step, world.rank))
        self.model.train()
        batches = self.recipe.stage.experience(self.models, self._window(step))
        weights = [self.recipe.stage.weight(batch) for batch in batches]
        [weight] = self.stepper.reduce([math.fsum(weights)])
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        sums: dict[str, float] = {}
        for index, batch in enumerate(batches):
            total += self.stepper.micro_step(
                lambda batch=batch: self._loss(batch, sums), scale=1 / max(weight, 1.0), last=index + 1 == len(batches)
            )
        tokens = sum(batch.num_tokens for batch in batches if batch.num_trained)
        names = sorted(sums)
        loss, tokens, stop, *rest = self.stepper.reduce([float(total), float(tokens), float(self.should_stop()), *(sums[n] for n in names)])
        self._check_finite("loss", loss, step)
        info = self.stepper.update(step, self._check_finite)
        self.recipe.method.after_step(self.model, step)
        seconds = time.perf_counter() - started
        at = self.at
        self.at = replace(
            at, step=step + 1, tokens=at.tokens + int(tokens), trained_tokens=at.trained_tokens + int(weight), seconds=at.seconds + seconds
        )
        record = {"step": step + 1, "epoch": (step + 1) / self.order.steps_per_epoch, "loss": loss / max(weight, 1.0)}
        record |= {name: value / max(weight, 1.0) for name, value in zip(names, rest, strict=True)}
        record |= {"grad_norm": info.grad_norm, "lr": info.lr, "tokens": self.at.tokens, "trained_tokens": self.at.trained_tokens}
        record |= {"tokens_per_s": tokens / seconds, "seconds": self.at.seconds, "time": time.time(), "num_steps": self.num_steps}
        if self.at.step % self.recipe.output.log_every == 0 or self.at.step == self.num_steps:
            self._write(record | ({"skipped": True} if info.skipped else {}))
        return stop > 0

    def _loss(self, batch: Batch, sums: dict[str, float]) -> torch.Tensor:
        loss = self.recipe.stage.loss(self.models, batch)
        for name, value in loss.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        return loss.total

    def _check_finite(self, what: str, value: float, step: int) -> None:
        """Every rank sees the same reduced value, so all of them raise, before any weight is touched."""
        if math.isfinite(value):
            return
        self._settle()
        blocks = ", ".join(str(int(b)) for b in self.order.window(step)[:16])
        raise TrainingError(
            f"the {what} of step {step + 1} is not finite",
            where=f"training blocks {blocks}",
            got=value,
            wanted="a number",
            remedy="lower optim.lr, lengthen optim.warmup, or set optim.clip_norm; weights before this step are in the last checkpoint",
        )

    def _window(self, step: int) -> list[Batch]:
        """This rank's batches; as many as the busiest rank's, silent ones at the end."""
        window = self.order.window(step)
        dealt = deal(window, self.sizes["train"][window], self.world.size, self.recipe.backend.micro_batch)
        mine = [self._batch("train", indices) for indices in dealt[self.world.rank]]
        short = max(map(len, dealt)) - len(mine)
        if short:
            mine += [self._batch("train", [int(window[0])]).silent()] * short
        return mine

    def _batch(self, split: str, indices: list[int]) -> Batch:
        blocks = [self.prepared.block(split, index) for index in indices]
        pad = self.tokenizer.pad_token_id
        return collate(blocks, padded=self.layout == "padded", pad_id=0 if pad is None else pad).to(self.world.device)

    def _is_validation_step(self, step: int) -> bool:
        if not len(self.sizes["validation"]):
            return False
        every = self.recipe.eval.every_steps or self.order.steps_per_epoch
        return step % every == 0 or step == self.num_steps

    @torch.no_grad()
    def _validate(self) -> bool:
        """Mean loss per trained token over the validation split, dealt to the ranks; keeps the score for early stopping."""
        self.model.eval()
        count = min(len(self.sizes["validation"]), self.recipe.eval.max_blocks or len(self.sizes["validation"]))
        dealt = deal(np.arange(count), self.sizes["validation"][:count], self.world.size, self.recipe.backend.micro_batch)
        total, weight = 0.0, 0.0
        mine = [(indices, 1) for indices in dealt[self.world.rank]]
        mine += [([0], 0)] * (max(map(len, dealt)) - len(mine))  # as many forward passes on every rank: sharded weights gather in them
        for indices, counts in mine:
            batch = self._batch("validation", indices)
            loss = self.stepper.run(partial(self.recipe.stage.loss, self.models, batch)).total
            total += float(loss) * counts
            weight += self.recipe.stage.weight(batch) * counts
        total, weight = self.stepper.reduce([total, weight])
        if not weight:
            log.warning("the validation blocks looked at hold no trained token: nothing to validate with")
            return False
        loss = total / weight
        better = math.isfinite(loss) and (self.at.best_loss is None or loss < self.at.best_loss)
        self.at = replace(self.at, best_step=self.at.step, best_loss=loss, stale=0) if better else replace(self.at, stale=self.at.stale + 1)
        self._write({"step": self.at.step, "validation_loss": loss, "perplexity": math.exp(min(loss, 50)), "time": time.time()})
        return True

    def _write(self, record: dict[str, Any]) -> None:
        if self.journal:
            self.journal.write(record)
            if self.on_progress:
                self.on_progress(record)

    def finish(self) -> Trained:
        """Makes `final/` of the best (or last) step: weights, probes, result; sealed and read back."""
        chosen = self.at.best_step if self.recipe.eval.choose == "best" and self.at.best_loss is not None else self.at.step
        if chosen != self.at.step:
            self._take_back(chosen)
        metrics = {
            "steps": self.at.step,
            "tokens": self.at.tokens,
            "trained_tokens": self.at.trained_tokens,
            "train_seconds": self.at.seconds,
            "validation_loss": self.at.best_loss if chosen == self.at.best_step else None,
            "layout": self.layout,
        }
        trained = Trained(self.at.step, chosen, metrics, self.world.size)
        sealing = self.run.sealing("final", {"recipe": self.at.recipe, "step": chosen})
        with sealing if self.world.is_main else nullcontext(Path()) as folder:
            self._save_final(folder)
            if self.world.is_main:
                (folder / "result.json").write_text(json.dumps(asdict(trained)))
        self.stepper.reduce([0.0])  # nobody leaves before the result is sealed
        return trained

    def _take_back(self, step: int) -> None:
        try:
            with self.run.opened(checkpoint_key(step)) as folder:
                self.stepper.load(self.recipe.method, folder)
        except IntegrityError as error:
            raise IntegrityError(
                "the best step's checkpoint is damaged, so no result can be made of it", where=f"{self.run.url}/{checkpoint_key(step)}",
                got=error, wanted="what was sealed", remedy=f"make the result of the last step, {self.at.step}: eval.choose=last",
            ) from error  # fmt: skip

    def _warn_of_a_damaged_best(self) -> None:
        """Said when a run goes on, for at its end nothing can be done about it but to take the last step."""
        best = self.at.best_step
        if self.recipe.eval.choose == "best" and best and best != self.at.step:
            try:
                verify(self.run.folder / checkpoint_key(best))
            except IntegrityError as error:
                log.warning(
                    "the best step's checkpoint, %d, is damaged; unless a better one comes, end with eval.choose=last: %s", best, error
                )

    def _save_final(self, folder: Path) -> None:
        """Every rank takes part (sharded weights are gathered); rank 0 writes."""
        method, dtype = self.recipe.method, self.recipe.model.dtype
        self.stepper.export(method, folder, DTYPES[dtype])
        if method.is_adapter:
            probes = self._probes()
            if self.world.is_main:
                probes.save(folder)
        elif self.world.is_main:
            self.tokenizer.save_pretrained(folder)

    def _probes(self) -> Probes:
        """As trained, and, where one process holds the whole model, in fp32 too: what another device can reproduce tightly."""
        method, held = self.recipe.method, self.recipe.method.held(self.recipe.model.dtype)
        self.model.eval()

        def recorded(precision: str) -> Probes:
            return record(self.model, self.tokenizer, partial(method.without, self.model), precision)

        probes = self.stepper.run(partial(recorded, held))
        if self.world.is_main and not is_exact(held) and self.stepper.crew is None:
            with method.in_fp32(self.model):  # not as a step runs: without its autocast
                probes = probes.merged(recorded(held + IN_FP32))
        return probes

    def close(self) -> None:
        self.writer.close()
        self.stepper.close()
        if self.journal:
            self.journal.close()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
