"""ZeRO's state as fragments: which part of every trainable parameter this rank holds, written and read without gathering anything.

In: a DeepSpeed optimizer of stage 1, 2 or 3. Out: one safetensors file a rank; the same state back, on any number of ranks and any stage.
Runs in: train workers.

    zero/rank-00001-of-00003.safetensors   0.weight 0.exp_avg 0.exp_avg_sq 1.weight ...: this rank's flat fp32 tensors, one a group
                                           metadata: which run of which parameter lies where in them; the optimizer's step

A reader takes the runs that overlap its own, so the layout does not depend on who reads: any number of ranks, any stage. Nothing is stored
twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ftcore.errors import IntegrityError
from ftcore.safetensors_stream import TensorFile, TensorPlan
from ftcore.zero_runtime import own_run, shape_of

FOLDER, MOMENTS = "zero", ("exp_avg", "exp_avg_sq")
BUFFER = "buffer:"


@dataclass(frozen=True)
class Fragment:
    """A run of one flattened parameter, held here in fp32 as a piece of one of the optimizer's flat tensors."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element of the parameter that is held here."""
    numel: int
    group: int
    """Which flat tensor."""
    offset: int
    """Where in it."""

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().narrow(0, self.offset, self.numel)


class ZeroState:
    """The fragments of one rank and the flat tensors they live in. `zero` is DeepSpeed's optimizer, `adam` the torch optimizer inside."""

    def __init__(self, trainable: list[tuple[str, nn.Parameter]], zero: Any, adam: torch.optim.Optimizer, stage: int, rank: int) -> None:
        self.zero, self.adam, self.stage = zero, adam, stage
        self.shapes = {name: shape_of(parameter) for name, parameter in trainable}
        found = self._sharded(trainable, rank) if stage == 3 else self._replicated(trainable)
        self.fragments = [fragment for fragment in found if fragment.numel > 0]

    def _sharded(self, trainable: list[tuple[str, nn.Parameter]], rank: int) -> Iterator[Fragment]:
        """Stage 3 cuts every parameter into equal runs, the last one padded."""
        for name, parameter in trainable:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            yield Fragment(name, shape_of(parameter), *own_run(parameter, rank), group, offset)

    def _replicated(self, trainable: list[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
        """Stages 1 and 2 cut the concatenation of all parameters; DeepSpeed links each parameter to its part of this rank's cut."""
        for name, parameter in trainable:
            link = parameter._hp_mapping
            if link is not None:
                here, there = link.lp_fragment_address, link.hp_fragment_address
                yield Fragment(name, shape_of(parameter), here.start, here.numel, link.param_group_index, there.start)

    @property
    def flats(self) -> list[Tensor]:
        """The fp32 masters, one tensor a group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def num_steps(self) -> float:
        """Updates made so far; 0 before the first, when there are no moments yet."""
        states = [self.adam.state.get(flat, {}) for flat in self.flats]
        return max((float(state["step"]) for state in states if "step" in state), default=0.0)

    def require_held(self) -> None:
        """Raises IntegrityError unless the masters and moments are here: DeepSpeed leaves empty tensors for what it swapped to NVMe."""
        for fragment in self.fragments:
            flat = self.flats[fragment.group]
            moments = [value for kind, value in self.adam.state.get(flat, {}).items() if kind in MOMENTS]
            held = min(tensor.numel() for tensor in (flat, *moments))
            if held < fragment.offset + fragment.numel:
                raise IntegrityError(
                    "the optimizer's state is not in this rank's memory, so no checkpoint could hold it", where=fragment.name,
                    got=f"{held} elements", wanted=f"{fragment.offset + fragment.numel} or more",
                    remedy="backend.offload_optimizer=cpu (parameters may stay on nvme)",
                )  # fmt: skip

    def save(self, path: Path, buffers: Mapping[str, Tensor]) -> None:
        """Streams this rank's flat tensors (and `buffers`) into `path`; holds no copy of them."""
        self.require_held()
        steps = self.num_steps()
        kinds = ("weight", *MOMENTS) if steps else ("weight",)
        flats = {f"{group}.{kind}": self._flat(group, kind) for group in range(len(self.flats)) for kind in kinds}
        tensors = flats | {BUFFER + name: buffer for name, buffer in buffers.items()}
        runs = [[f.name, f.start, f.numel, f.group, f.offset] for f in self.fragments]
        facts = {"steps": steps, "runs": runs, "shapes": self.shapes}
        path.parent.mkdir(parents=True, exist_ok=True)
        plans = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with TensorFile(path, plans, {"zero": json.dumps(facts, separators=(",", ":"))}) as file:
            for plan in file.plans:
                file.write(plan.name, tensors[plan.name])

    def _flat(self, group: int, kind: str) -> Tensor:
        flat = self.flats[group]
        return flat if kind == "weight" else self.adam.state[flat][kind]

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Fills this rank's fragments from a checkpoint of any number of ranks; returns the buffers. `publish` then makes them count."""
        self.require_held()
        with ExitStack() as stack:
            shards = [Shard.open(path, stack) for path in sorted((folder / FOLDER).glob("*.safetensors"))]
            self._check(shards, folder)
            steps = shards[0].steps
            for flat in self.flats if steps else ():
                state = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                self.adam.state[flat] = {"step": torch.tensor(steps, dtype=torch.float32, device=flat.device), **state}
            for fragment in self.fragments:
                for kind in ("weight", *MOMENTS) if steps else ("weight",):
                    _fill(fragment, kind, fragment.of(self._flat(fragment.group, kind)), shards, folder)
            return {name: tensor for shard in shards for name, tensor in shard.buffers()}

    def _check(self, shards: list[Shard], folder: Path) -> None:
        """Raises IntegrityError unless these are all the parts of one checkpoint of this very model."""
        if not shards or len(shards) != shards[0].count:
            wanted = f"{shards[0].count}" if shards else "at least one"
            raise IntegrityError("parts of this checkpoint are missing", where=folder / FOLDER, got=len(shards), wanted=wanted)
        saved = shards[0].shapes
        odd = sorted(name for name in self.shapes.keys() | saved.keys() if self.shapes.get(name) != saved.get(name))
        if odd:
            raise IntegrityError(
                "the saved weights do not bind to this model", where=folder, got=f"{len(odd)} parameters differ, first {odd[0]}",
                wanted="every parameter, with its shape", remedy="same method and base as it was made with; else give the run another name",
            )  # fmt: skip

    def publish(self) -> None:
        """Makes loaded masters the weights that the forward pass uses. All ranks call."""
        if self.stage == 3:
            for group in range(len(self.flats)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.zero.update_lp_params()


@dataclass(frozen=True)
class Shard:
    """One rank's file of a checkpoint, open for reading slices."""

    file: Any
    count: int
    """How many ranks wrote."""
    steps: float
    runs: dict[str, Fragment]
    shapes: dict[str, tuple[int, ...]]

    @staticmethod
    def open(path: Path, stack: ExitStack) -> Shard:
        file = stack.enter_context(safe_open(path, "pt"))
        facts = json.loads(file.metadata()["zero"])
        shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
        runs = {name: Fragment(name, shapes[name], *where) for name, *where in facts["runs"]}
        return Shard(file, int(path.stem.rsplit("-", 1)[1]), facts["steps"], runs, shapes)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        for key in sorted(self.file.keys()):
            if key.startswith(BUFFER):
                yield key.removeprefix(BUFFER), self.file.get_tensor(key)


def part_name(rank: int, size: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}-of-{size:05d}.safetensors"


def _fill(fragment: Fragment, kind: str, into: Tensor, shards: list[Shard], folder: Path) -> None:
    """Copies the overlapping slices of all shards; every element must be covered exactly once."""
    end, covered = fragment.start + fragment.numel, 0
    for shard in shards:
        run = shard.runs.get(fragment.name)
        low, high = (max(run.start, fragment.start), min(run.start + run.numel, end)) if run else (0, 0)
        if run and low < high:
            at = run.offset - run.start  # where the parameter's element 0 would lie in the flat tensor
            slices = shard.file.get_slice(f"{run.group}.{kind}")
            into.narrow(0, low - fragment.start, high - low).copy_(slices[at + low : at + high])
            covered += high - low
    if covered != fragment.numel:
        raise IntegrityError(
            "this checkpoint lacks a part of a parameter", where=folder / FOLDER, wanted="each element exactly once",
            got=f"{covered} of {fragment.numel} elements of {fragment.name}", remedy="use an older checkpoint",
        )  # fmt: skip
