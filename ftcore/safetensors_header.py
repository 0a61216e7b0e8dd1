"""safetensors headers, read with caps: what a file says it holds must be exactly what is there, before any library maps it.

In: a .safetensors file. Out: tensor name -> dtype and shape, or an IntegrityError naming the file. Runs in: everywhere; no torch.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ftcore.errors import IntegrityError

MAX_HEADER_BYTES = 32 * 1024**2
MAX_TENSORS = 200_000
MAX_DIMS = 8
MAX_NAME = 512
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorFact:
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def check_safetensors(path: Path) -> dict[str, TensorFact]:
    """Reads the header and holds it against the file's size.

    Raises IntegrityError when the file is cut short, padded, overlapping, larger than the caps, or no safetensors file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > size - 8:
            raise _damaged(
                path, "it ends before its header does", f"{size} bytes", f"at least {length + 8 if len(start) == 8 else 8} bytes"
            )
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise _damaged(path, "its header is not of a believable size", f"{length} bytes", f"2 to {MAX_HEADER_BYTES} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON", str(error)[:200], "a safetensors header") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object", type(header).__name__, "a safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not text", type(metadata).__name__, "an object of strings")
    if len(header) > MAX_TENSORS:
        raise _damaged(path, "it holds too many tensors", str(len(header)), f"at most {MAX_TENSORS}")
    return _tensors(path, header, size - 8 - length)


def _tensors(path: Path, header: dict[str, Any], num_bytes: int) -> dict[str, TensorFact]:
    spans: list[tuple[int, int]] = []
    facts: dict[str, TensorFact] = {}
    for name, entry in header.items():
        shown = name[:80].encode("unicode_escape").decode()
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
            sound = all(type(n) is int and n >= 0 for n in numbers) and len(shape) <= MAX_DIMS and len(name) <= MAX_NAME
            sound = sound and end - begin == prod(shape) * BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"its entry for `{shown}` cannot be read", str(error)[:200], "dtype, shape and data_offsets") from error
        if not sound:
            raise _damaged(path, f"its entry for `{shown}` contradicts itself", str(entry)[:200], "a size that is shape x dtype")
        spans.append((begin, end))
        facts[name] = TensorFact(dtype, tuple(shape))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _damaged(path, "its tensors overlap or leave holes", f"a tensor at byte {begin}", f"byte {position}")
        position = end
    if position != num_bytes:
        raise _damaged(path, "it is cut short or has bytes nobody claims", f"{num_bytes} bytes of tensors", f"{position} bytes")
    return facts


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`: of a key that appears twice, one reader would take the first and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _damaged(path: Path, why: str, got: str, wanted: str) -> IntegrityError:
    return IntegrityError(
        f"this safetensors file is damaged: {why}", where=path, got=got, wanted=wanted, remedy="copy or download it again"
    )
