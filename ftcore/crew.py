"""Crew: the ranks of a run that write one checkpoint together, each its own part, from their writer threads.

In: a part to write on every rank. Out: one sealed folder, or the same error everywhere and nothing that looks whole.
Runs in: train workers whose backend shards its state.

Local (or shared) run folders are written into in place, under a name that does not count; remote ones get each rank's files directly. In
both cases rank 0 writes the manifest last, once every part is there: a rank that dies in the middle leaves nothing that counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ftcore.backends.base import World
from ftcore.errors import StorageError
from ftcore.rundir import RunDir
from ftcore.storage import Folder, file_digest

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long ranks wait for one another: for the slowest upload. A rank that dies closes its connections, and is noticed at once."""


class Crew:
    """A process group of its own (gloo), so that writer threads can meet while training's collectives go on."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank. All ranks call."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


@dataclass(frozen=True)
class Draft:
    """What this rank wrote of a checkpoint that is not sealed yet, or the error that kept it from writing."""

    folder: Path
    own: Path | None
    """The folder to remove in the end, on the rank that made it."""
    problem: Exception | None


def draft(run: RunDir, key: str, crew: Crew, write: Callable[[Path], None]) -> Draft:
    """All ranks call, at a step boundary; each `write(folder)`s its own files from what it holds now. Errors wait for `seal_together`."""
    own: Path | None = None
    problem: Exception | None = None
    try:
        run.refuse_if_taken()  # before anything of another driver's checkpoint is touched
        if crew.is_main or not run.folder.is_local:
            own = run.building(key)
        if crew.is_main and not run.folder.is_local:
            run.folder.delete(key)
    except Exception as error:  # raised by seal_together, once the other ranks know of it
        problem = error
    told = crew.gather((str(own), problem is None))
    folder = own or Path(told[0][0])
    if not all(begun for _, begun in told):
        return Draft(folder, own, problem)
    try:
        if not folder.is_dir():
            raise StorageError(
                "this worker does not see the run folder that rank 0 writes to", where=folder, wanted="one folder that all nodes share",
                remedy="put output.runs on a shared file system or on s3://",
            )  # fmt: skip
        write(folder)
    except Exception as error:  # raised by seal_together, once the other ranks know of it
        return Draft(folder, own, error)
    return Draft(folder, own, None)


def seal_together(
    run: RunDir, key: str, extra: dict[str, object], crew: Crew, part: Draft, before: Callable[[], None] = lambda: None
) -> None:
    """All ranks call, from any one thread; returns when the whole is sealed and read back.

    `before`: on rank 0, what must be durable when the checkpoint is.
    Raises the rank's own error, or StorageError with another rank's: never a checkpoint that holds only some of the parts.
    """
    try:
        facts: dict[str, dict[str, object]] = {}
        with _Told(crew):
            if part.problem:
                raise part.problem
            if crew.is_main:
                before()
            if not run.folder.is_local and not crew.is_main:
                facts = _uploaded(run, part.folder, key)
        others = {name: fact for part_facts in crew.gather(facts) for name, fact in part_facts.items()}
        with _Told(crew):
            if crew.is_main:
                run.put_in_place(part.folder, key, extra, others)
    finally:
        if part.own:
            shutil.rmtree(part.own, ignore_errors=True)


def _uploaded(run: RunDir, folder: Path, key: str) -> dict[str, dict[str, object]]:
    facts: dict[str, dict[str, object]] = {}
    for name in Folder(folder).files():
        run.refuse_if_taken()
        run.folder.put(folder / name, f"{key}/{name}")
        facts[name] = {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size}
    return facts


class _Told:
    """Ends a stage of common work: where any rank failed, all ranks raise."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        problems = self.crew.gather("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            return  # its own error goes on
        for rank, problem in enumerate(problems):
            if problem:
                raise StorageError(
                    f"rank {rank} could not write its part of a checkpoint", got=problem.splitlines()[0], wanted="every rank's part",
                    remedy="see that rank's error; what is sealed stays usable",
                )  # fmt: skip
