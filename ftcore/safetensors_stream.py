"""Safetensors written one tensor at a time: what is written need never be in memory as a whole.

In: names, dtypes and shapes first; then the tensors, in any order. Out: a safetensors file, byte for byte what the library would read.
Runs in: train workers whose backend shards.

Format: 8 bytes little-endian header length, the JSON header, the tensors' bytes end to end (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from torch import Tensor

from ftcore.errors import IntegrityError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(plans: Iterable[TensorPlan]) -> list[TensorPlan]:
    """Wider dtypes first, so that every tensor is aligned to its own size."""
    return sorted(plans, key=lambda plan: -plan.dtype.itemsize)


class TensorFile:
    """An open file; `write` takes each planned tensor once, in any order; leaving the context checks that all came."""

    def __init__(self, path: Path, plans: Iterable[TensorPlan], metadata: Mapping[str, str]) -> None:
        self.path, self.plans = path, in_file_order(plans)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset, self._offsets = 0, dict[str, int]()
        for plan in self.plans:
            end, self._offsets[plan.name] = offset + plan.num_bytes, offset
            header[plan.name] = {"dtype": NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._start = self._file.write(struct.pack("<Q", len(text)) + text)
        self._planned = {plan.name: plan for plan in self.plans}
        self._digests: dict[str, str] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        plan = self._planned[name]
        got = TensorPlan(name, tensor.dtype, tuple(tensor.shape))
        assert got == plan and name not in self._digests, f"wrote {got} where {plan} was planned, once"
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._digests[name] = hashlib.sha256(data).hexdigest()
        self._file.seek(self._start + self._offsets[name])
        self._file.write(data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        assert error is not None or len(self._digests) == len(self.plans), f"{len(self.plans) - len(self._digests)} tensors never came"

    def read_back(self) -> None:
        """Raises IntegrityError unless the file on disk holds every tensor as it was given."""
        with safe_open(self.path, "pt") as file:
            for plan in self.plans:
                data = file.get_tensor(plan.name).reshape(-1).view(torch.uint8).numpy()
                if hashlib.sha256(memoryview(data)).hexdigest() != self._digests[plan.name]:
                    raise IntegrityError(
                        "this file does not hold what was written", where=self.path, got=f"{plan.name} differs", wanted="every byte",
                        remedy="check the disk; the last checkpoint is sealed and sound",
                    )  # fmt: skip
