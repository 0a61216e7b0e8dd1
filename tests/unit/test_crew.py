"""What several ranks write together is one checkpoint or none, and never takes the place of another driver's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.backends.base import World
from ftcore.crew import Crew, draft, seal_together
from ftcore.errors import IntegrityError, Interrupted, StorageError
from ftcore.lease import LEASE
from ftcore.rundir import RunDir
from ftcore.safetensors_stream import TensorFile, TensorPlan
from ftcore.storage import verify
from ftcore.zero_state import Fragment, ZeroState
from tests.worlds import in_world

KEY = "checkpoints/step-000002"


class Alone:
    """A crew of one."""

    rank, size, is_main = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Second(Alone):
    """Rank 1 of a crew whose rank 0 says the same."""

    rank, is_main = 1, False


@pytest.mark.parametrize("crew", [Alone(), Second()])
@pytest.mark.parametrize("late", [False, True])
def test_a_driver_that_was_taken_over_spoils_nothing_of_the_new_ones_checkpoint(tmp_path: Path, crew: Any, late: bool) -> None:
    run = RunDir(f"memory://{tmp_path.name}-{crew.rank}-{late}", "run")
    with run.sealing(KEY) as folder:
        (folder / "weights").write_bytes(b"the new driver's")
    run.token = "old"
    run.folder.write(LEASE, json.dumps({"token": "old" if late else "new"}).encode())
    part = draft(run, f"{KEY}-late" if late else KEY, crew, lambda folder: (folder / "weights").write_bytes(b"the old driver's") and None)
    run.folder.write(LEASE, json.dumps({"token": "new"}).encode())
    with pytest.raises(Interrupted, match="taken this run over"):
        seal_together(run, KEY, {}, crew, part)
    verify(run.folder / KEY)
    assert run.folder.read(f"{KEY}/weights") == b"the new driver's"


def a_rank_0_that_cannot(rank: int, size: int, runs: str) -> list[str]:
    """What every rank is told when rank 0 cannot begin a checkpoint, and when what must be durable before it is not."""
    crew, run, told = Crew(World(rank=rank, size=size, local_rank=rank)), RunDir(runs, "run"), []
    building = run.building

    def full(key: str) -> Path:
        raise OSError(28, "No space left on device")

    def unwritten() -> None:
        raise OSError(28, "the journal")

    def write(folder: Path) -> None:
        (folder / f"part-{rank}").write_text("part")

    for make, before in ((full, lambda: None), (building, unwritten), (building, lambda: None)):
        run.building = make
        try:
            seal_together(run, KEY, {}, crew, draft(run, KEY, crew, write), before)
            told.append("sealed")
        except (OSError, StorageError) as error:
            told.append(error.what if isinstance(error, StorageError) else str(error))
    return told


def test_what_fails_on_rank_0_alone_ends_on_every_rank(tmp_path: Path) -> None:
    other = "rank 0 could not write its part of a checkpoint"
    first, second = in_world(2, a_rank_0_that_cannot, str(tmp_path))
    assert first == ["[Errno 28] No space left on device", "[Errno 28] the journal", "sealed"]
    assert second == [other, other, "sealed"]
    assert sorted(verify(RunDir(tmp_path, "run").folder / KEY)["files"]) == ["part-0", "part-1"]


def test_tensors_of_several_dtypes_are_written_in_any_order(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(3, dtype=torch.bfloat16), "buffer": torch.arange(5.0), "count": torch.tensor(7)}
    plans = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFile(tmp_path / "model.safetensors", plans, {}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    file.read_back()


def test_masters_that_are_not_in_memory_are_no_checkpoint(tmp_path: Path) -> None:
    state = ZeroState.__new__(ZeroState)
    state.fragments, state.shapes, state.stage = [Fragment("w", (4,), 0, 4, 0, 0)], {"w": (4,)}, 2
    state.zero = type("Swapped", (), {"single_partition_of_fp32_groups": [torch.empty(0)]})
    state.adam = torch.optim.AdamW([torch.zeros(1)])
    for wrong in (state.require_held, lambda: state.save(tmp_path / "part", {}), lambda: state.load(tmp_path)):
        with pytest.raises(IntegrityError, match="not in this rank's memory"):
            wrong()
    assert not (tmp_path / "part").exists()


def test_what_a_killed_process_left_is_swept_but_no_lock_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "run")
    run.folder.write("recipe.yaml", b"kept")
    litter = [".recipe.yaml.0a1b2c3d.tmp", ".final.0a1b2c3d.tmp/weights", "checkpoints/.step-000002.0a1b2c3d.tmp/weights"]
    for name in (*litter, f".{LEASE}.lock.tmp"):
        (run.folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder.path / name).write_bytes(b"")
    run.sweep()
    left = sorted(path.name for path in run.folder.path.rglob("*") if path.is_file())
    assert left == [f".{LEASE}.lock.tmp", "recipe.yaml"]
