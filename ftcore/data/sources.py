"""Sources: the files behind one path of a recipe: a file, a folder, a glob, any fsspec URL, or a dataset of the hub.

In: the path as a person typed it. Out: SourceFiles (what to open, what to call it, how it reads). Runs in: the driver; workers open them.
"""

from __future__ import annotations

import fnmatch
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import fsspec

from ftcore.errors import DataError, StorageError
from ftcore.remote import explained, open_filesystem
from ftcore.storage import explain_oserror

Kind = Literal["json", "jsonl", "csv", "tsv", "parquet", "text"]
SUFFIXES: dict[str, Kind] = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet",
    ".txt": "text", ".text": "text",
}  # fmt: skip
_KNOWN = ", ".join([*SUFFIXES, "each also with .gz (but parquet)"])
_BUFFER_BYTES = 1 << 20
_SPLIT_WORDS = {
    "train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "testing"},
}  # fmt: skip
_HUB_ORDER: tuple[Kind, ...] = ("parquet", "jsonl", "csv", "tsv", "json", "text")
_CONVERTED = "@refs%2Fconvert%2Fparquet"
"""Where the hub keeps its own Parquet copy of datasets that come as other things."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """`label` is what people call it; `url` what is opened."""

    label: str
    url: str
    kind: Kind
    gzipped: bool
    size: int

    @property
    def is_local(self) -> bool:
        return is_local(self.url)


def is_local(url: str) -> bool:
    return "://" not in url


@contextmanager
def open_bytes(url: str, *, gzipped: bool = False, start: int = 0) -> Iterator[IO[bytes]]:
    """A binary stream from byte `start` on."""
    with ExitStack() as stack:
        try:
            if is_local(url):
                file: IO[bytes] = stack.enter_context(Path(url).open("rb"))
            else:  # buffered, for readline with a limit, which fsspec's own files do not have
                file = io.BufferedReader(stack.enter_context(_open_remote(url)), _BUFFER_BYTES)
            if start:
                file.seek(start)
        except OSError as error:
            raise error if isinstance(error, StorageError) else explain_oserror(error, "read", url) from error
        yield cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=file))) if gzipped else file


def _open_remote(url: str) -> Any:
    if url.startswith("hf://"):
        return fsspec.open(url, "rb").open()
    with explained("read", url):
        fs, path = open_filesystem(url)
        return fs.open(path, "rb")


def kind_of(name: str) -> tuple[Kind | None, bool]:
    """(kind, gzipped) by the file's name."""
    path = name.lower()
    gzipped = path.endswith(".gz")
    suffix = Path(path.removesuffix(".gz")).suffix
    return SUFFIXES.get(suffix), gzipped


def list_files(path: str) -> list[SourceFile]:
    """Every file a source's path names, sorted. Raises DataError when there is none, one is empty, or a folder mixes formats."""
    if path.startswith("hf:"):
        files = _hub_files(path)
    elif is_local(path) or path.startswith("file://"):
        try:
            files = _local_files(path.removeprefix("file://"))
        except OSError as error:
            raise explain_oserror(error, "read", path) from error
    else:
        files = _remote_files(path)
    for file in files:
        if file.size == 0:
            raise DataError("this file is empty", where=file.label, got="0 bytes", wanted="rows", remedy="remove it or fill it")
    return files


def _local_files(path: str) -> list[SourceFile]:
    place = Path(path).expanduser()
    if any(mark in path for mark in "*?[") and not place.exists():
        anchor = Path(place.anchor) if place.is_absolute() else Path()
        pattern = str(place.relative_to(place.anchor)) if place.is_absolute() else str(place)
        found = sorted(match for match in anchor.glob(pattern) if match.is_file())
        return _picked([(str(match), str(match), match.stat().st_size) for match in found], path, is_glob=True)
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and not _hidden(file.relative_to(place)))
        return _picked([(str(file), str(file), file.stat().st_size) for file in found], path, is_glob=False)
    if not place.is_file():
        raise DataError(
            "there is nothing at this path",
            where=path,
            wanted="a file, a folder, a glob, a URL or hf:NAME",
            remedy="check data.sources for a typing error (relative paths start where the command runs)",
        )
    return [_file(path, str(place), place.stat().st_size)]


def _remote_files(path: str) -> list[SourceFile]:
    with explained("list", path):
        fs, root = open_filesystem(path)
        is_glob = any(mark in path for mark in "*?[")
        if is_glob:
            found = fs.glob(root, detail=True)
        elif fs.isfile(root):
            return [_file(path, path, int(fs.size(root) or 0))]
        else:
            found = fs.find(root, detail=True)
    facts = [(fs.unstrip_protocol(name), fs.unstrip_protocol(name), int(fact.get("size") or 0)) for name, fact in sorted(found.items())]
    return _picked([fact for fact in facts if not _hidden(Path(fact[0].rsplit("/", 1)[-1]))], path, is_glob=is_glob)


def _picked(found: list[tuple[str, str, int]], path: str, *, is_glob: bool) -> list[SourceFile]:
    """Files of a folder or glob. A folder may hold other things beside, but data of one kind only."""
    known = [(fact, kind) for fact in found if (kind := kind_of(fact[0])[0]) is not None]
    if not known or (is_glob and len(known) < len(found)):
        odd = ", ".join(Path(fact[0]).name for fact in found if kind_of(fact[0])[0] is None)[:300]
        raise DataError(
            "no readable files here" if not known else "the glob matches files of an unknown kind",
            where=path,
            got=odd or "nothing",
            wanted=_KNOWN,
            remedy="rename the files, or point at the right ones",
        )
    kinds = Counter(kind for _, kind in known)
    if len(kinds) > 1 and not is_glob:
        most = next(Path(fact[0]).suffix for fact, kind in known if kind == kinds.most_common(1)[0][0])
        listing = "; ".join(
            f"{count} {kind} ({', '.join(Path(fact[0]).name for fact, other in known if other == kind)[:120]})"
            for kind, count in kinds.most_common()
        )
        raise DataError(
            "this folder mixes formats",
            where=path,
            got=listing,
            wanted="files of one kind",
            remedy=f"pick with a glob, for example {path.rstrip('/')}/*{most}, one source each",
        )
    return [_file(*fact) for fact, _ in known]


def _file(label: str, url: str, size: int) -> SourceFile:
    kind, gzipped = kind_of(url)
    if kind is None:
        raise DataError(
            "cannot tell how this file reads", where=label, got=Path(label).suffix or "no suffix", wanted=_KNOWN, remedy="rename it"
        )
    if kind == "parquet" and gzipped:
        raise DataError("a gzipped Parquet file cannot be read in parts", where=label, remedy="unpack it (Parquet is compressed already)")
    return SourceFile(label, url, kind, gzipped, size)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hub_files(path: str) -> list[SourceFile]:
    """`hf:NAME[:SPLIT]`; NAME may go on with a folder of the dataset (a configuration). Without SPLIT: train, or all where none is named.

    Reads the dataset's own files over the hub's file API, so HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold and no code of it is run.
    """
    name, _, split = path.removeprefix("hf:").partition(":")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", name):
        raise DataError("this is no dataset name", where=path, wanted="hf:NAME or hf:OWNER/NAME, with :SPLIT if you like")
    listed = _hub_listing(path, name)
    found = listed or _hub_listing(path, name + _CONVERTED) or listed
    if found is None:
        remedy = "check the name; HF_TOKEN opens what is private or gated"
        raise DataError("there is no such dataset on the hub", where=path, got="not found", wanted="hf:OWNER/NAME", remedy=remedy)
    if not found:
        remedy = "it needs its own loading code: convert it to Parquet first"
        raise DataError("this dataset holds no readable files", where=path, wanted=_KNOWN, remedy=remedy)
    best = min((kind for file in found if (kind := kind_of(file.name)[0])), key=_HUB_ORDER.index)
    files = [file for file in found if kind_of(file.name)[0] == best]
    if split:
        chosen = [file for file in files if split in file.splits] or [file for file in files if _split_class(split) & file.splits]
    else:
        chosen = [file for file in files if "train" in file.splits]
    if split in ("", "train") and not any(file.splits for file in files):
        chosen = files
    folders = sorted({file.folder for file in chosen})
    if not chosen:
        splits = " | ".join(sorted(set().union(*(file.splits for file in files)))) or "none is named"
        raise DataError("this dataset has no such split", where=path, got=split or "train", wanted=splits)
    if len(folders) > 1:
        remedy = f"name one, for example hf:{name}/{folders[0]}{':' + split if split else ''}"
        raise DataError("this dataset has several configurations", where=path, got=", ".join(folders)[:300], wanted="one", remedy=remedy)
    return [_file(f"{path} ({file.name})", f"hf://{file.key}", file.size) for file in chosen]


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A dataset's file. splits: what its name (`train_sft-00000-of-00003.parquet`) or folder says it is part of, and the class of that."""

    key: str
    size: int
    inside: str
    """Its path below what was listed."""

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]

    @property
    def splits(self) -> set[str]:
        *folders, last = self.inside.split("/")
        stem = re.sub(r"[-.]\d{4,}(-of-\d+.*)?$", "", last.split(".")[0])
        exact = {name for name in (stem, *folders) if _split_class(name)}
        return exact.union(*map(_split_class, exact))

    @property
    def folder(self) -> str:
        """The folder that stands for a configuration: not `data`, not a split's."""
        return "/".join(part for part in self.inside.split("/")[:-1] if part != "data" and not _split_class(part))


def _split_class(name: str) -> set[str]:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return {split for split, names in _SPLIT_WORDS.items() if words & names}


def _hub_listing(path: str, name: str) -> list[_HubFile] | None:
    """Readable files of a dataset, sorted; None where the hub knows no such dataset, folder or branch."""
    root = f"datasets/{name}"
    try:
        fs: Any = fsspec.filesystem("hf")
        found = fs.find(root, detail=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(
            "cannot list this dataset on the hub",
            where=path,
            got=f"{type(error).__name__}: {error}"[:300],
            remedy="check the name, your network and HF_ENDPOINT, or use a local copy",
        ) from error
    skipped = ("dataset_infos.json", "dataset_info.json", "*README*", "*LICENSE*")
    return [
        _HubFile(key, int(fact.get("size") or 0), key[len(root) :].lstrip("/"))
        for key, fact in sorted(found.items())
        if kind_of(key)[0] and not any(fnmatch.fnmatch(key.rsplit("/", 1)[-1], pattern) for pattern in skipped)
    ]
