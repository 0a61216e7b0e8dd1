"""Identity: everything prepared blocks are made from, as one digest, without reading a row or opening the tokenizer.

In: a recipe. Out: facts and their digest: the name of the prepared folder. Runs in: the driver; no torch, no transformers.

What it covers: the content of every source, the tokenizer's files, the chat template, the stage, the data section (but where the cache is,
who prepares, and the thresholds that only refuse), and the code of these rooms, so that a changed rule never meets old blocks.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.data.sources import SourceFile, list_files, open_bytes
from ftcore.errors import ModelError
from ftcore.mirror import local_copy
from ftcore.remote import explained, open_filesystem
from ftcore.storage import Folder, digest_of, file_digest

if TYPE_CHECKING:
    from ftcore.recipe import Model, Recipe

VERSION = 2
"""Of the layout of a prepared folder."""
MEMO = ".sources.json"
"""In a local cache folder: SHA-256 of source files by path, size and modification time, so that they are hashed once."""
SETTLED_S = 2.0
"""A file changed more recently than this is hashed again next time: its next change might not move its time stamp."""
_ROOM = Path(__file__).parent
_NOT_IN_IDENTITY = {"cache", "engine", "max_rejected", "max_truncated"}
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", *_TEMPLATE_FILES)


def identity(recipe: Recipe, cache: Folder) -> dict[str, Any]:
    """The facts; `digest_of` them names the prepared folder."""
    data = recipe.data.model_dump(mode="json", exclude=_NOT_IN_IDENTITY)
    contents = source_contents(recipe, cache)
    sources = [{**source, "content": content} for source, content in zip(data["sources"], contents, strict=True)]
    for source in sources:
        del source["path"]
    return {
        "version": VERSION,
        "data": {**data, "sources": sources},
        "stage": recipe.stage.model_dump(mode="json"),
        "tokenizer": tokenizer_files_digest(recipe.model),
        "template": _template(recipe.model.chat_template),
        "code": _code_digest(recipe),
    }


def source_contents(recipe: Recipe, cache: Folder) -> list[str]:
    """One digest per source, over its files in order."""
    memo: dict[str, Any] = cache.read_json(MEMO) if cache.is_local and cache.exists(MEMO) else {}
    known = dict(memo)
    found = [digest_of([_file_content(file, memo) for file in list_files(source.path)]) for source in recipe.data.sources]
    if cache.is_local and memo != known:
        cache.write_json(MEMO, memo)
    return found


def _file_content(file: SourceFile, memo: dict[str, Any]) -> list[str]:
    """How the file reads, and its content. A remote file is named by its ETag (or what its storage has instead) and size."""
    how = f"{file.kind}{'.gz' if file.gzipped else ''}"
    if not file.is_local:
        return [how, _remote_content(file)]
    path = Path(file.url).resolve()
    stat = path.stat()
    known = memo.get(str(path))
    if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
        return [how, known[2]]
    digest = file_digest(path)
    if time.time() - stat.st_mtime > SETTLED_S:
        memo[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
    return [how, digest]


def _remote_content(file: SourceFile) -> str:
    with explained("look at", file.url):
        fs, path = open_filesystem(file.url)
        info = fs.info(path)
    for name in ("ETag", "etag", "md5Hash", "blob_id", "sha256", "checksum"):
        if info.get(name):
            return f"{name}:{info[name]}:{info.get('size')}"
    with open_bytes(file.url) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def model_config(model: Model) -> dict[str, Any]:
    """The model's config.json; {} without one. Of a model that is elsewhere, small files alone are fetched. Raises ModelError."""
    config = _model_folder(model) / "config.json"
    if not config.is_file():
        return {}
    try:
        found = json.loads(config.read_bytes())
    except ValueError as error:
        raise ModelError("this file is not JSON", where=config, got=str(error)[:200], remedy="copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelError("this file is not a JSON object", where=config, got=type(found).__name__, remedy="copy or download it again")
    return found


def model_type(model: Model) -> str:
    """The architecture's name in config.json ("" without one); it chooses the template where the tokenizer has none."""
    return str(model_config(model).get("model_type", ""))


def tokenizer_files_digest(model: Model) -> str:
    """Over the tokenizer's files and the architecture's name."""
    folder = _model_folder(model)
    names = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    if not names:
        raise ModelError(
            "this folder holds no tokenizer",
            where=folder,
            wanted="tokenizer.json (or tokenizer.model, vocab.json)",
            remedy="save it there with tokenizer.save_pretrained",
        )
    return digest_of([model_type(model), [[path.relative_to(folder).as_posix(), file_digest(path)] for path in names]])


def _model_folder(model: Model) -> Path:
    """The model's folder; for a name on the hub, where its files lie on this machine, fetched if they are not there yet."""
    folder = Path(local_copy(model.path, weights=False)).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # half a second, and only for a model named by its place on the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_TOKENIZER_FILES, "config.json"]
    try:
        try:
            return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise ModelError(
            "there is no such model folder, and the hub does not give it either",
            where=model.path,
            got=f"{type(error).__name__}: {first}",
            wanted="a folder with config.json and tokenizer.json, or a hub name `owner/name`",
            remedy="check model.path and the network",
        ) from error


def _template(name: str) -> str:
    return file_digest(Path(name)) if name.endswith(".jinja") and Path(name).is_file() else name


def _code_digest(recipe: Recipe) -> str:
    stage = sys.modules[type(recipe.stage).__module__].__file__
    plugins = [sys.modules[name].__file__ for name in recipe.plugins if name in sys.modules]
    files: Iterable[Path] = sorted(path for path in _ROOM.rglob("*") if path.suffix in (".py", ".jinja"))
    outside = [Path(name) for name in (stage, *plugins) if name]
    return digest_of([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in (*files, *outside)])
