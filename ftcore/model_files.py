"""Model files: which base a machine has, told without reading gigabytes: its small files whole, its weights by header and size.

In: a folder or a hub name. Out: ModelFiles. Runs in: every node; no torch, no network.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from ftcore.errors import ModelError
from ftcore.safetensors_header import MAX_HEADER_BYTES
from ftcore.weights import HUB_PATTERNS, weight_files

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class ModelFiles:
    """Two machines with one digest hold the same model, unless tensors were altered without changing a name, a shape or a size."""

    folder: str
    num_files: int
    gib: float
    digest: str


def model_files(path: str, revision: str = "main") -> ModelFiles:
    """Raises ModelError when it is not there, IntegrityError when a shard is missing."""
    folder = Path(path) if Path(path).is_dir() else _hub_folder(path, revision)
    weights = weight_files(folder)
    small = sorted({found for pattern in SMALL_FILES for found in folder.glob(pattern)})
    whole = hashlib.sha256()
    for file in small:
        whole.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    for file in weights:
        whole.update(f"{file.name}\0{file.stat().st_size}\0".encode() + hashlib.sha256(_header(file)).digest())
    size = sum(file.stat().st_size for file in [*small, *weights])
    return ModelFiles(str(folder), len(small) + len(weights), size / 2**30, whole.hexdigest())


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return start + opened.read(min(length, MAX_HEADER_BYTES))


def _hub_folder(path: str, revision: str) -> Path:
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError("there is no such model folder", where=path)
    from huggingface_hub import snapshot_download  # costs a second; only hub names need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(HUB_PATTERNS), local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelError("this model is not in the hub's cache here", where=path) from error
