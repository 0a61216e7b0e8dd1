"""Changes: which keys a run may go on with another value of, and why not the others.

In: the recipe a run was begun with, the one it is asked to go on with. Out: the changes, or a ConfigError. Runs in: the driver.

The rule: what was recorded so far must be what the new recipe would have recorded. So a key may change that says where, how fast or how
often to look; and the length may, when no step already taken would have had another learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftcore.data.order import Order
from ftcore.data.prepared import Prepared
from ftcore.errors import ConfigError
from ftcore.history import shown
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir

MAY_CHANGE = (
    "resources.", "output.", "plugins", "eval.targets", "data.cache", "data.engine", "backend.micro_batch",
    "backend.gradient_checkpointing", "backend.deterministic", "backend.zero", "backend.offload_", "backend.nvme_path",
)  # fmt: skip
"""Where and how fast; the loss does not depend on them. Also for a finished run: what is left to do is to publish and report."""
MAY_CHANGE_UNFINISHED = ("eval.every_steps", "eval.patience", "eval.choose")
"""When to look, when to stop, what to take. Not eval.max_blocks: losses over other blocks cannot be compared with the best so far."""
BASE_NAMES = ("model.path", "model.revision")
LENGTH = ("optim.epochs", "optim.max_steps")


def refuse_changes(
    run: RunDir, before: Recipe, now: Recipe, prepared_url: str, another: str, same_base: Callable[[], bool] = bool
) -> dict[str, tuple[Any, Any]]:
    """What changed, path -> (before, now). Raises ConfigError naming each key that changed and must not.

    Before the first checkpoint everything may: nothing was learned yet. `another`: the remedy to offer. `same_base`: whether a base that
    goes by another name now holds the same weights.
    """
    old, new = leaves(before.model_dump(mode="json")), leaves(now.model_dump(mode="json"))
    changed = {path: (old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)}
    steps, finished = run.checkpoint_steps(), run.is_finished()
    if not (steps or finished):
        return changed
    allowed = MAY_CHANGE if finished else (*MAY_CHANGE, *MAY_CHANGE_UNFINISHED)
    wrong = {path: pair for path, pair in changed.items() if not path.startswith(allowed)}
    if wrong.keys() & set(BASE_NAMES) and same_base():
        wrong = {path: pair for path, pair in wrong.items() if path not in BASE_NAMES}
    why = ""
    if wrong and not finished and set(wrong) <= set(LENGTH):
        why = other_past(before, now, steps[-1], Prepared.open(prepared_url).num_blocks("train"))
        if not why:
            return changed
    if wrong:
        raise ConfigError(
            "this run was begun with another recipe", where=run.url, got=shown(wrong) + (f" ({why})" if why else ""),
            wanted="the same recipe" + (" (this run is finished)" if finished else ""), remedy=another,
        )  # fmt: skip
    return changed


def other_past(before: Recipe, now: Recipe, step: int, num_blocks: int) -> str:
    """Why a run that took `step` steps cannot get this other length; "" when the steps taken are the same in both."""
    lengths = [Order(num_blocks, r.optim.batch_size, r.optim.seed).num_steps(r.optim.epochs, r.optim.max_steps) for r in (before, now)]
    if lengths[1] < step:
        return f"it has taken {step} steps already"
    differs = next((s for s in range(step) if before.optim.lr_at(s, lengths[0]) != now.optim.lr_at(s, lengths[1])), None)
    if differs is not None:
        return f"step {differs + 1} would have had another learning rate; with schedule constant a run may be lengthened"
    return ""


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf; lists are leaves."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
