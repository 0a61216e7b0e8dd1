"""Alternatives: recipes a few steps from one that does not fit, as overrides a person can paste; the nearest that fits.

In: a recipe, what each recipe needs, what fits. Out: Alternatives, nearest first. Runs in: the driver; no torch.

Near means: what changes the least of what is learnt. The same updates in smaller pieces come first, then the same updates on more machines,
then a narrower optimizer or base, and at last another method. Memory of the host leads away too (HOST_STEP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from ftcore.memory import GIB, Need
from ftcore.recipe import Recipe
from ftcore.recipe_checks import impossible

MOST_WORKERS = 64
HOST_STEP = 32 * GIB
"""So much of the host's memory, for one worker, leads one further away: else offload would come before a second machine, however large."""
Step = tuple[int, tuple[str, ...]]
"""(how far it leads away, overrides)."""


@dataclass(frozen=True)
class Alternative:
    """`overrides` changes the recipe to one whose largest rank takes `need`."""

    overrides: tuple[str, ...]
    need: Need
    distance: int

    @property
    def rank(self) -> tuple[int, int]:
        """Less is nearer."""
        return self.distance, self.need.host_peak


def nearest(recipe: Recipe, needed: Callable[[Recipe], Need], fits: Callable[[Need], bool]) -> Alternative | None:
    """Of those that fit; None when none does."""
    combined = [(sum(cost for cost, _ in steps), [text for _, texts in steps for text in texts]) for steps in product(*_axes(recipe))]
    best: Alternative | None = None
    for distance, overrides in sorted(combined, key=lambda each: each[0]):
        if best is not None and distance > best.distance:
            break  # memory of a host only leads further away
        found = _tried(recipe, overrides, needed, distance) if overrides else None
        if found is not None and (best is None or found.rank < best.rank) and fits(found.need):
            best = found
    return best


def one_step_away(recipe: Recipe, needed: Callable[[Recipe], Need]) -> Iterator[Alternative]:
    """What each single change would take, whether that fits or not; no more than twice the workers."""
    for axis in _axes(recipe, 2 * recipe.resources.max_workers):
        for distance, overrides in axis:
            found = _tried(recipe, list(overrides), needed, distance) if overrides else None
            if found is not None:
                yield found


def _axes(recipe: Recipe, most_workers: int = MOST_WORKERS) -> list[list[Step]]:
    """What can be chosen on its own; each axis starts with leaving it as it is."""
    backend, workers = recipe.backend, recipe.resources.max_workers
    micro: list[Step] = [(0, ())] + ([(1, ("backend.micro_batch=1",))] if backend.micro_batch > 1 else [])
    again: list[Step] = [(0, ())] + ([] if backend.gradient_checkpointing else [(2, ("backend.gradient_checkpointing=true",))])
    narrow: list[Step] = [(0, ())] + ([(20, ("model.dtype=bf16",))] if recipe.model.dtype in ("fp32", "fp64") else [])
    moments: list[Step] = [(0, ())] + ([(10, ("optim.kind=adamw_8bit",))] if recipe.optim.kind == "adamw" else [])
    return [micro, again, [(0, ()), *_sharded(recipe, workers, most_workers)], moments, narrow, [(0, ()), *_methods(recipe)]]


def _sharded(recipe: Recipe, workers: int, most: int) -> Iterator[Step]:
    """ZeRO over the workers there are, over more, with offload; on a CPU only what needs no further machine."""
    counts = [workers] if workers > 1 else []
    more = 2
    while recipe.resources.gpus_per_worker and more <= most:
        counts += [more] if more > workers else []
        more *= 2
    for order, count in enumerate(counts):
        grown = (f"resources.workers={count}",) if count != workers else ()
        for stage in (1, 2, 3):
            yield 4 + stage + 6 * order, ("backend.kind=deepspeed", f"backend.zero={stage}", *grown)
    if recipe.resources.gpus_per_worker:
        away = ("backend.kind=deepspeed", "backend.zero=3", "backend.offload_optimizer=cpu")
        yield 9, away
        yield 12, (*away, "backend.offload_params=cpu")


def _methods(recipe: Recipe) -> Iterator[Step]:
    kind = recipe.method.kind
    if kind == "full":
        yield 60, ("method.kind=lora",)
    if kind in ("full", "lora"):
        yield 70 if kind == "full" else 30, ("method.kind=qlora", "method.bits=8")
        yield 75 if kind == "full" else 35, ("method.kind=qlora",)


def _tried(recipe: Recipe, overrides: list[str], needed: Callable[[Recipe], Need], distance: int) -> Alternative | None:
    changed = with_overrides(recipe, overrides)
    if changed is None:
        return None
    need = needed(changed)
    return Alternative(tuple(overrides), need, distance + need.host_peak // HOST_STEP)


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe | None:
    """The recipe with simple `path=value`s set over it; None where it could not be."""
    tree: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    tree["backend"] = {"kind": recipe.backend.kind, **tree.get("backend", {})}
    for text in overrides:
        path, _, value = text.partition("=")
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    try:
        changed = Recipe.model_validate(tree)
    except ValidationError:
        return None
    return None if impossible(changed) else changed
