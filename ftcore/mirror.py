"""Mirror: copies of remote things on this machine, verified, shared by its processes: prepared shards, a base model on s3://.

In: a URL. Out: a local folder that holds the same. Runs in: the driver, train workers; nothing here for local paths.

A copy is made under another name and renamed when it is whole, so a process that dies leaves no half of one. It lies in FTCORE_CACHE
(~/.cache/ftcore); what is no longer wanted there can be removed at any time between runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.errors import IntegrityError, ModelError, StorageError
from ftcore.storage import Folder, digest_of

NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")
"""Pickles, and weights of other programs, are not copied."""

if TYPE_CHECKING:
    from ftcore.recipe import Model


def mirror(*parts: str) -> Path:
    """A folder of the cache on this machine; made with its parents, for this user only."""
    root = Path(os.environ.get("FTCORE_CACHE") or Path.home() / ".cache" / "ftcore")
    folder = root.joinpath(*parts)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "copies of remote files need a folder on this machine", where=folder, got=str(error), remedy="set FTCORE_CACHE to one"
        ) from error
    return folder


def at_hand(model: Model, *, weights: bool = True) -> Model:
    """The same model section with a path that transformers can open; without `weights`, one for its tokenizer and config.json alone."""
    return model if "://" not in model.path else model.model_copy(update={"path": local_copy(model.path, weights=weights)})


def local_copy(path: str, *, weights: bool = True) -> str:
    """The path itself when it is local (or a hub name); for a URL, where a verified copy of that folder lies on this machine.

    The copy is named by every object's name, size and ETag, so a folder that changed is another copy. Asked once a process.
    """
    return path if "://" not in path else _copied(path.rstrip("/"), weights)


@cache
def _copied(url: str, weights: bool) -> str:
    folder = Folder(url)
    if folder.is_local:
        return str(folder.path)
    left = NEVER if weights else (*NEVER, ".safetensors")
    facts = {key: fact for key, fact in folder.tags().items() if not key.endswith(left)}
    if "config.json" not in facts:
        got = "nothing" if not facts else ", ".join(sorted(facts)[:5])
        raise ModelError("there is no model at this place", where=url, got=got, wanted="config.json, tokenizer and *.safetensors files")
    target = mirror("models") / digest_of([url, sorted(facts.items())])[:32]
    if target.is_dir():
        return str(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.at_once(lambda key: _copy(folder, key, temporary / key, facts[key][0]), facts)
        _settle(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


def _copy(folder: Folder, key: str, local: Path, size: int) -> None:
    """One file, held against its size, and its MD5 where the storage knows it."""
    folder.get(key, local)
    if local.stat().st_size != size:
        raise IntegrityError(
            "a file of the base model changed or was cut while it was copied", where=f"{folder}/{key}", got=f"{local.stat().st_size} bytes",
            wanted=f"{size} bytes", remedy="start again when it is whole",
        )  # fmt: skip
    wanted = folder.md5(key)
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() if wanted else ""
    if digest != wanted:
        raise IntegrityError(
            "a file of the base model is not the one in its storage", where=f"{folder}/{key}", got=f"md5 {digest}", wanted=f"md5 {wanted}",
            remedy="start again; if it stays so, give a local copy of the model",
        )  # fmt: skip


def _settle(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
