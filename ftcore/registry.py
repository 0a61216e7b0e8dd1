"""Registry: the visible table of one-file implementations of an axis (method, stage, backend, format, ...).

In: sibling files of a package, or `plugins:`. Out: kind -> class or function. Runs in: every process, filled the same way.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ftcore.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a kind to its implementation; filled on first use by importing every file beside the axis's base module.

    `axis` is the word people read in errors ("method"); `package` the folder whose files register themselves.
    """

    def __init__(self, axis: str, package: str) -> None:
        self.axis, self.package = axis, package
        self._items: dict[str, T] = {}
        self._filled = False

    def register(self, kind: str) -> Callable[[T], T]:
        """Decorator: `@METHODS.register("lora")`. Two different things under one kind are refused."""

        def add(item: T) -> T:
            known = self._items.get(kind)
            if known is not None and (_origin(known) != _origin(item)):
                raise ConfigError(
                    f"two implementations call themselves {self.axis} `{kind}`",
                    where=f"{_origin(known)} and {_origin(item)}",
                    remedy="rename one of them",
                )
            self._items[kind] = item
            return item

        return add

    def fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name != "base":
                importlib.import_module(f"{self.package}.{module.name}")

    def __getitem__(self, kind: str) -> T:
        self.fill()
        if kind not in self._items:
            near = difflib.get_close_matches(str(kind), self._items, n=1)
            hint = f"did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"unknown {self.axis} kind", got=repr(kind), wanted=" | ".join(sorted(self._items)), remedy=hint)
        return self._items[kind]

    def __iter__(self) -> Iterator[str]:
        self.fill()
        return iter(sorted(self._items))

    def __contains__(self, kind: object) -> bool:
        self.fill()
        return kind in self._items

    def items(self) -> list[tuple[str, T]]:
        self.fill()
        return sorted(self._items.items(), key=lambda pair: pair[0])


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"
