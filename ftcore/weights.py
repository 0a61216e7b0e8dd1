"""The base model's weights on disk: which files they are, whether they are whole, and the digest that names them.

In: a model folder (or a hub name). Out: checked files, a SHA-256. Runs in: the driver before any worker starts, publish, serving; no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ftcore.errors import IntegrityError, ModelError, StorageError
from ftcore.mirror import local_copy
from ftcore.safetensors_header import TensorFact, check_safetensors
from ftcore.storage import Folder, digest_of, file_digest

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def base_folder(path: str, revision: str = "main") -> Path:
    """The local folder of a base: the folder itself, or the hub's snapshot (downloaded when a hub is reachable; never pickles)."""
    path = local_copy(path)
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(
            "there is no such model folder", where=path, wanted="a folder or a hub name like Qwen/Qwen2.5-0.5B", remedy="check the path"
        )
    from huggingface_hub import snapshot_download  # costs a second; only hub names need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            "this model is neither a folder here nor one the hub gives",
            where=f"{path} (revision {revision})",
            got=str(error).split("\n")[0][:200],
            remedy="check the name, the revision and HF_TOKEN; offline, give the path of a folder",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base: the index's shards, else model.safetensors, else every one that is no adapter.

    Raises ModelError when there are none (naming the pickle that is there instead), IntegrityError when a shard is missing.
    """
    if (folder / INDEX).is_file():
        shards = sorted(set(_index(folder).values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise IntegrityError(
                    "the index names a shard outside its folder", where=folder / INDEX, got=shard[:200], wanted="a file name"
                )
            if not (folder / shard).is_file():
                raise IntegrityError(
                    "a shard that the index names is missing", where=folder / shard, remedy="copy or download the model again"
                )
        return [folder / shard for shard in shards]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not found:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for path in sorted(folder.glob(pattern))]
        raise ModelError(
            "this base holds its weights only as a pickle, which can run code when it is loaded"
            if pickles
            else "this folder holds no weights",
            where=folder / pickles[0] if pickles else folder,
            wanted="safetensors files",
            remedy="convert it to safetensors in a sandbox, or take a revision that has them"
            if pickles
            else "give the folder of a transformers model",
        )
    return found


def check_base(folder: str | Path) -> dict[str, TensorFact]:
    """Validates a base folder by headers alone (fast for any size): config readable, every shard there, sizes as the headers say.

    Returns every tensor's dtype and shape. Raises ModelError or IntegrityError naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("there is no such model folder", where=folder, remedy="check the path")
    _json(folder / "config.json")
    facts: dict[str, TensorFact] = {}
    for path in weight_files(folder):
        for name, fact in check_safetensors(path).items():
            if name in facts:
                raise IntegrityError("two shards hold the same tensor", where=path, got=name[:200], remedy="remove shards of an older save")
            facts[name] = fact
    if (folder / INDEX).is_file():
        lost = sorted(set(_index(folder)) - set(facts))
        if lost:
            raise IntegrityError(
                "the index names tensors that no shard holds",
                where=folder / INDEX,
                got=", ".join(lost[:3])[:200],
                remedy="copy the model again",
            )
    return facts


def weights_digest(folder: str | Path) -> str:
    """SHA-256 that names a base's weights: over the sorted SHA-256s of its safetensors files, whatever they are called.

    Hashes are remembered by (path, size, mtime) so that a large base is read once.
    """
    return digest_of(sorted(_remembered_digest(path.resolve()) for path in weight_files(Path(folder))))


def _remembered_digest(path: Path) -> str:
    stat = path.stat()
    cache = Folder(os.environ.get("FTCORE_CACHE") or Path.home() / ".cache" / "ftcore")
    key = f"digests/{digest_of([str(path), stat.st_size, stat.st_mtime_ns])}.json"
    if cache.exists(key):
        remembered = cache.read_json(key)
        if isinstance(remembered, dict) and isinstance(remembered.get("sha256"), str):
            return str(remembered["sha256"])
    digest = file_digest(path)
    try:
        cache.write_json(key, {"path": str(path), "sha256": digest})
    except StorageError:
        return digest  # a home that cannot be written to costs a second hashing, nothing else
    return digest


def _index(folder: Path) -> dict[str, str]:
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise IntegrityError("this index has no weight map", where=folder / INDEX, remedy="copy or download the model again")
    return weight_map


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError("a model folder needs this file", where=path, remedy="give the folder of a transformers model")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError("this file is not JSON", where=path, got=str(error)[:200], remedy="copy or download it again") from error
    if not isinstance(value, dict):
        raise IntegrityError("this file is not a JSON object", where=path, got=type(value).__name__, remedy="copy or download it again")
    return value
