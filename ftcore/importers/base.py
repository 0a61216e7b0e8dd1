"""Importing: another program's config, key by key, into a recipe; and the account of what became of each key.

In: a flat or nested YAML mapping. Out: recipe values, and one Fate for every key that was in the file. Runs in: a person's terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftcore.recipe_errors import shown
from ftcore.recipe_file import dump_yaml

Became = Literal["translated", "default", "not supported", "ignored"]
ORDER: tuple[Became, ...] = ("translated", "default", "not supported", "ignored")
SECTIONS = ("name", "model", "data", "method", "stage", "backend", "optim", "resources", "eval", "output")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Fate:
    """What became of one key: translated to what, left at our default, not supported and why, or ignored and why."""

    key: str
    value: Any
    became: Became
    text: str


@dataclass
class Importing:
    """A config being read. Rules `move` or `tell` of the keys they know; `rest` tells of all others at the end."""

    program: str
    config: dict[str, Any]
    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        return self.config.get(key)

    def put(self, path: str, value: Any) -> None:
        *parents, last = path.split(".")
        node = self.values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value

    def tell(self, key: str, became: Became, text: str, value: Any = None) -> None:
        self.fates[key] = Fate(key, self.config.get(key) if value is None else value, became, text)

    def move(self, key: str, path: str, value: Any = None, note: str = "") -> None:
        """Puts the key's value (or `value`, where it had to be converted) at `path` of the recipe."""
        new = self.config.get(key) if value is None else value
        self.put(path, new)
        self.tell(key, "translated", f"{path}: {shown(new)}{f' ({note})' if note else ''}")

    def rest(self, unsupported: dict[str, str], ignored: dict[str, str]) -> None:
        """Tells of every key no rule has spoken for. Tables may end a key in `*`."""
        for key, value in self.config.items():
            if key in self.fates:
                continue
            reason = looked_up(key, ignored)
            if reason is not None:
                self.tell(key, "ignored", reason)
            elif value in (None, False, "", [], {}):
                self.tell(key, "default", "off there, and our default is the same or has no such thing")
            else:
                reason = looked_up(key, unsupported)
                self.tell(key, "not supported", reason or f"not a key of {self.program} that this importer knows; nothing was done with it")

    def name(self, *candidates: Any) -> None:
        """The run's name: the first of these that is set, else the file's, made fit for a folder."""
        wanted = next((str(name) for name in candidates if name), self.file.stem)
        slug = re.sub(r"[^a-z0-9._-]+", "-", wanted.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-._")
        self.put("name", slug[:63] or "imported")


@dataclass(frozen=True)
class Imported:
    """The result: recipe values in the recipe's own order of sections, and the account."""

    program: str
    file: Path
    values: dict[str, Any]
    fates: tuple[Fate, ...]

    def text(self) -> str:
        left = [fate.key for fate in self.fates if fate.became == "not supported"]
        head = f"# From {self.file.name} ({self.program}) by `ftcore import-config`."
        head += f" Not carried over: {', '.join(left)}." if left else " Every key was carried over or has no effect on the result."
        ordered = {key: self.values[key] for key in SECTIONS if key in self.values}
        return f"{head}\n{dump_yaml(ordered)}"

    def table(self) -> str:
        """Every key of the file, grouped by what became of it."""
        width = max((len(fate.key) for fate in self.fates), default=0)
        lines = []
        for became in ORDER:
            group = [fate for fate in self.fates if fate.became == became]
            if group:
                lines.append(f"{became} ({len(group)})")
                lines += [f"  {fate.key:<{width}} = {shown(fate.value, 32):<32}  {fate.text}" for fate in group]
        return "\n".join(lines)


Reader = Callable[[Importing], None]


def looked_up(key: str, table: dict[str, str]) -> str | None:
    if key in table:
        return table[key]
    return next((reason for pattern, reason in table.items() if pattern.endswith("*") and key.startswith(pattern[:-1])), None)


def number(value: Any) -> Any:
    """`1e-4` that another YAML reader left as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def source_path(path: str, config_file: Path, split: str | None = None, revision: str | None = None) -> str:
    """A data file stays a path (seen from where the config lies, when it is there); any other name is a hub data set."""
    local = Path(path)
    if path.startswith("hf:") or "://" in path:
        return path
    if path.startswith((".", "/", "~")) or local.suffix in DATA_FILES or local.exists() or (config_file.parent / path).exists():
        beside = config_file.parent / path
        return str(beside) if not local.exists() and beside.exists() else path
    return f"hf:{path}" + (f":{split}" if split and split != "train" else "")
