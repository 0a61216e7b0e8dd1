"""Shared: several LoRA candidates trained at once over one frozen base: one forward and backward pass for all, all else each its own.

In: recipes that differ in rank, alpha, targets and optimizer, prepared blocks. Out: journal lines by candidate, as each alone would write.
Runs in: a search's hosts, one process each.

Candidates lie behind each other in one batch of segments that never see each other; each has its own order, optimizer, schedule, losses
and end, and may come and go between two steps. Nothing is written: the best one is trained again, alone and with all its proofs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftcore.backends.base import World
from ftcore.checkpoint import Position
from ftcore.data.collate import IGNORED, Batch, collate
from ftcore.data.order import Order, deal
from ftcore.data.types import Block
from ftcore.data_parallel import PlainStepper
from ftcore.errors import ConfigError, FtcoreError, TrainingError
from ftcore.layers.shared_lora import Ranges, SharedLinear, Update
from ftcore.loop import Blocks, seed_all
from ftcore.models import CausalModel, autocast_dtype, autocasting, choose_layout, load_base
from ftcore.recipe import Recipe
from ftcore.sharing import base_key, refusal
from ftcore.stages.base import Models

Line = dict[str, Any]


class _Part(CausalModel):
    """The policy as one candidate's loss sees it: its own rows of hidden states that were made for all."""

    def __init__(self, whole: CausalModel, rows: Tensor) -> None:
        self.__dict__.update(whole.__dict__)
        self._rows = rows

    def hidden(self, batch: Batch) -> Tensor:
        return self._rows


class _Weights(nn.Module):
    """A candidate's A and B by layer."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        super().__init__()
        self.held = nn.ParameterList([weight for update in updates.values() for weight in (update.a, update.b)])


@dataclass
class Candidate:
    """One run among those that share a base."""

    name: str
    recipe: Recipe
    updates: dict[str, Update]
    stepper: PlainStepper
    order: Order
    num_steps: int
    at: Position = field(default_factory=Position)

    @property
    def is_over(self) -> bool:
        patience = self.recipe.eval.patience
        return self.at.step >= self.num_steps or (patience is not None and self.at.stale >= patience)

    def validates(self) -> bool:
        every = self.recipe.eval.every_steps or self.order.steps_per_epoch
        return self.at.step % every == 0 or self.at.step == self.num_steps


class Shared:
    """A frozen base and the candidates on it."""

    def __init__(self, recipe: Recipe, prepared: Blocks, device: str = "cpu") -> None:
        """Loads the base of `recipe`. Raises ConfigError when candidates cannot share it."""
        if reason := refusal(recipe):
            raise ConfigError("this recipe cannot share its base with other trials", got=reason, remedy="search with --shared off")
        self.key, self.prepared, self.world = base_key(recipe), prepared, World(device=device)
        base = load_base(recipe.model, recipe.method, device=device)
        base.requires_grad_(False)
        if recipe.backend.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        layout = choose_layout(base, recipe.model.attention, packs=True)
        self.base, self.policy = base, CausalModel(base, layout)
        if not self.policy.head_exact or layout != "varlen":
            raise ConfigError(
                "this model makes its loss of whole logits: candidates cannot be told apart in it",
                where=recipe.model.path, remedy="search with --shared off",
            )  # fmt: skip
        self.autocast = autocast_dtype(recipe.model.dtype)
        self.sizes = {split: prepared.block_lengths(split) for split in ("train", "validation")}
        self.ranges = Ranges()
        self.layers: dict[str, SharedLinear] = {}
        self.candidates: dict[str, Candidate] = {}

    def add(self, name: str, recipe: Recipe) -> Candidate:
        """Begins a candidate, its first weights as if it were alone. Raises ConfigError when it cannot share this base."""
        if (reason := refusal(recipe)) or base_key(recipe) != self.key:
            raise ConfigError("this trial cannot join the others", where=name, got=reason or "another base, other data or another stage")
        updates = self._fresh_updates(recipe)
        optim = recipe.optim
        order = Order(self.prepared.num_blocks("train"), optim.batch_size, optim.seed)
        num_steps = order.num_steps(optim.epochs, optim.max_steps)
        stepper = PlainStepper(_Weights(updates), optim, num_steps, self.world, self.autocast)
        candidate = self.candidates[name] = Candidate(name, recipe, updates, stepper, order, num_steps)
        for layer, update in updates.items():
            self.layers[layer].updates[name] = update
        return candidate

    def drop(self, name: str) -> None:
        """Ends a candidate, wherever it is."""
        candidate = self.candidates.pop(name)
        for layer in candidate.updates:
            del self.layers[layer].updates[name]

    def step(self) -> dict[str, list[Line] | FtcoreError]:
        """One optimizer step of every candidate: its lines, or the error that ended it. Who is over or failed is dropped."""
        began, told = time.perf_counter(), dict[str, list[Line] | FtcoreError]()
        going = list(self.candidates.values())
        windows = {each.name: self._window(each) for each in going}
        weights = {each.name: math.fsum(each.recipe.stage.weight(collate(b, padded=False)) for b in windows[each.name]) for each in going}
        totals = dict.fromkeys(windows, 0.0)
        self.base.train()
        for number in range(max(map(len, windows.values()))):
            now = [(each, windows[each.name][number]) for each in going if number < len(windows[each.name])]
            losses = self._losses(now)
            torch.stack([total / max(weights[name], 1.0) for name, total in losses.items()]).sum().backward()
            for name, total in losses.items():
                totals[name] += float(total.detach())
        share = (time.perf_counter() - began) / len(going)
        for each in going:
            try:
                told[each.name] = [self._updated(each, totals[each.name], weights[each.name], windows[each.name], share)]
            except TrainingError as error:
                told[each.name] = error
                self.drop(each.name)
        for name, line in self._validated([each for each in going if each.name in self.candidates and each.validates()]):
            lines = told[name]
            assert isinstance(lines, list)
            lines.append(line)
        for each in going:
            if each.is_over and each.name in self.candidates:
                self.drop(each.name)
        return told

    def _updated(self, each: Candidate, total: float, weight: float, window: Sequence[list[Block]], seconds: float) -> Line:
        step = each.at.step
        _check_finite("loss", total, step)
        info = each.stepper.update(step, _check_finite)
        tokens = sum(len(block.ids) for blocks in window for block in blocks)
        at = each.at
        each.at = replace(
            at, step=step + 1, tokens=at.tokens + tokens, trained_tokens=at.trained_tokens + int(weight), seconds=at.seconds + seconds
        )
        at = each.at
        record = {"step": at.step, "epoch": at.step / each.order.steps_per_epoch, "loss": total / max(weight, 1.0)}
        record |= {"grad_norm": info.grad_norm, "lr": info.lr, "tokens": at.tokens, "trained_tokens": at.trained_tokens}
        return record | {"seconds": at.seconds, "num_steps": each.num_steps}

    def _window(self, each: Candidate) -> list[list[Block]]:
        """The micro-batches of this step, as the candidate would read them alone."""
        window = each.order.window(each.at.step)
        [mine] = deal(window, self.sizes["train"][window], 1, each.recipe.backend.micro_batch)
        return [[self.prepared.block("train", index) for index in indices] for indices in mine]

    def _losses(self, now: Sequence[tuple[Candidate, list[Block]]]) -> dict[str, Tensor]:
        """The summed loss of each candidate's blocks, of one forward pass over all."""
        batches = [collate(blocks, padded=False).to(self.world.device) for _, blocks in now]
        joint = collate([block for _, blocks in now for block in blocks], padded=False).to(self.world.device)
        first, self.ranges.parts = 0, []
        for (each, _), batch in zip(now, batches, strict=True):
            self.ranges.parts.append((each.name, first, first + batch.ids.numel()))
            first += batch.ids.numel()
        with autocasting(self.world.device, self.autocast):
            rows = self.policy.hidden(joint).split([int((batch.targets != IGNORED).sum()) for batch in batches])
            return {
                each.name: each.recipe.stage.loss(Models(_Part(self.policy, own)), batch).total
                for (each, _), batch, own in zip(now, batches, rows, strict=True)
            }

    @torch.no_grad()
    def _validated(self, due: Sequence[Candidate]) -> Iterator[tuple[str, Line]]:
        """Mean loss per trained token over the validation blocks, of all that look now in one pass."""
        if not due or not len(self.sizes["validation"]):
            return
        self.base.eval()
        count = min(len(self.sizes["validation"]), due[0].recipe.eval.max_blocks or len(self.sizes["validation"]))
        [dealt] = deal(np.arange(count), self.sizes["validation"][:count], 1, due[0].recipe.backend.micro_batch)
        totals, weight = dict.fromkeys([each.name for each in due], 0.0), 0.0
        for indices in dealt:
            blocks = [self.prepared.block("validation", index) for index in indices]
            for name, total in self._losses([(each, blocks) for each in due]).items():
                totals[name] += float(total)
            weight += due[0].recipe.stage.weight(collate(blocks, padded=False))
        for each in due:
            loss = totals[each.name] / max(weight, 1.0)
            better = math.isfinite(loss) and (each.at.best_loss is None or loss < each.at.best_loss)
            best = {"best_step": each.at.step, "best_loss": loss, "stale": 0} if better else {"stale": each.at.stale + 1}
            each.at = replace(each.at, **best)
            yield each.name, {"step": each.at.step, "validation_loss": loss, "perplexity": math.exp(min(loss, 50))}

    def _fresh_updates(self, recipe: Recipe) -> dict[str, Update]:
        """What the method puts on the base at the start, taken off it again: PEFT's own values, drawn as in a run of its own."""
        with self._bare():
            seed_all(recipe.optim.seed)
            applied = recipe.method.apply(self.base)
            updates = {}
            for name, module in applied.get_base_model().named_modules():
                if hasattr(module, "lora_A") and "default" in module.lora_A:
                    a, b = (nn.Parameter(side["default"].weight.detach().clone()) for side in (module.lora_A, module.lora_B))
                    updates[name] = Update(a, b, float(module.scaling["default"]))
            applied.unload()
            self.base.requires_grad_(False)
        for name in updates:
            if name not in self.layers:
                self.layers[name] = SharedLinear(self.base.get_submodule(name), self.ranges)
        self._install()
        return updates

    def _install(self) -> None:
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.base.get_submodule(parent), leaf, layer)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The base without our layers."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.base.get_submodule(parent), leaf, layer.base)
        yield
        self._install()


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(f"the {what} of step {step + 1} is not finite", got=value, wanted="a number", remedy="a lower optim.lr")
