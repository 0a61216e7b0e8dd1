"""Same base: which weights a run began with, so that it goes on from these wherever they lie now, and from no others.

In: a RunDir, a recipe. Out: base.json in the run's folder; a ConfigError when the base is another one. Runs in: the driver.

Hashing reads the whole base, so it goes on beside the training, and its result is remembered (ftcore.weights): publishing needs it too. A
run that ended before it was known has nothing to compare with, and records it when it goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ftcore.errors import ConfigError, FtcoreError
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from ftcore.weights import base_folder, weights_digest

BASE = "base.json"
log = logging.getLogger(__name__)


def is_same_base(run: RunDir, recipe: Recipe) -> bool:
    """Whether the recipe's base is known to be the one this run began with. Reads all of it, unless it was read before."""
    return run.folder.exists(BASE) and _digest(recipe) == run.folder.read_json(BASE)["weights"]


def refuse_other_base(run: RunDir, recipe: Recipe, remedy: str) -> None:
    """Raises ConfigError when the weights are not those this run began with; a run that recorded none is let through."""
    if run.folder.exists(BASE) and not is_same_base(run, recipe):
        raise ConfigError(
            "this base is not the one this run began with", where=recipe.model.path, got=f"weights {_digest(recipe)[:12]}",
            wanted=f"weights {run.folder.read_json(BASE)['weights'][:12]}, as {run.url}/{BASE} has it",
            remedy=f"give the base it began with, wherever that lies now (model.path=...), or {remedy}",
        )  # fmt: skip


@contextmanager
def recording_base(run: RunDir, recipe: Recipe) -> Iterator[None]:
    """Finds the digest while the body trains; waits for it at a good end only."""

    def record() -> None:
        try:
            run.folder.write_json(BASE, {"path": recipe.model.path, "revision": recipe.model.revision, "weights": _digest(recipe)})
        except (FtcoreError, OSError) as error:  # the run itself reads the same files, and says what is wrong with them
            log.warning("the base's digest could not be recorded: %s", error)

    if run.folder.exists(BASE) and run.checkpoint_steps():
        yield
        return
    thread = threading.Thread(target=record, name="base-digest", daemon=True)
    thread.start()
    yield
    thread.join()


def _digest(recipe: Recipe) -> str:
    return weights_digest(base_folder(recipe.model.path, recipe.model.revision))
