"""Checkpoints: step-000200/ with weights, optimizer and position; copied at once, written beside the training, sealed, read back.

In: the stepper's and method's state at a step boundary. Out: sealed folders, of which the newest and the best are kept.
Runs in: train workers; rank 0 writes (every rank its part, where the backend shards), all ranks read.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from ftcore.backends.base import Stepper
from ftcore.crew import draft, seal_together
from ftcore.errors import StorageError
from ftcore.methods.base import Method
from ftcore.rundir import RunDir, checkpoint_key
from ftcore.storage import explain_oserror

STATE = "state.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps. Order, dropout and schedule all follow from (seed, step), so this is the whole cursor."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    """Validations since the best one."""
    recipe: str = ""
    world_size: int = 1
    prepared: str = ""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; the step after it goes on at once. Errors surface at the next save or `wait`."""

    def __init__(self, run: RunDir, keep: int) -> None:
        self.run, self.keep = run, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.before: Callable[[], None] = lambda: None
        """Called in the writing thread before a checkpoint: what must be durable when it is sealed."""

    def save(self, position: Position, method: Method, stepper: Stepper, *, is_main: bool) -> None:
        """Every rank calls; rank 0 writes, or each rank its part where the backend shards (then every rank waits for the whole)."""
        self.wait()
        part, crew = stepper.snapshot(method), stepper.crew
        if not is_main and crew is None:
            return

        def write_part(folder: Path) -> None:
            part(folder)
            if is_main:
                (folder / STATE).write_text(json.dumps(asdict(position)))

        key = checkpoint_key(position.step)
        extra: dict[str, object] = {"step": position.step}
        mine = draft(self.run, key, crew, write_part) if crew else None  # written now: a shard is streamed from the live state, not copied

        def write() -> None:
            if crew and mine:
                seal_together(self.run, key, extra, crew, mine, self.before)
            else:
                self.before()
                with self.run.sealing(key, extra) as folder:
                    write_part(folder)
            if is_main:
                self._prune(position)

        self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint-writer")
        self._thread.start()

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # carried to the training thread, which raises it
            self._error = error

    def wait(self) -> None:
        """Returns when the last checkpoint is sealed. Raises StorageError when it could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise storage_error(error, self.run.url) from error

    def close(self) -> None:
        """Lets a checkpoint that is being written finish. Errors are not raised: the run is over, or has one of its own."""
        if self._thread:
            self._thread.join()

    def _prune(self, position: Position) -> None:
        """Keeps the newest and the best; a later step's is a damaged one that this run passed over."""
        steps = self.run.checkpoint_steps()
        kept = {*[step for step in steps if step <= position.step][-self.keep :], position.best_step}
        for step in steps:
            if step not in kept:
                self.run.folder.delete(checkpoint_key(step))


def storage_error(error: Exception, where: str) -> Exception:
    """Makes a full or refusing disk a StorageError; safetensors hides the operating system's error in its text."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError):
        return explain_oserror(error, "write a checkpoint", where)
    if isinstance(error, SafetensorError):
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        return explain_oserror(OSError(code, str(error)), "write a checkpoint", where)
    return error


def read_position(folder: Path) -> Position:
    return Position(**json.loads((folder / STATE).read_text()))
