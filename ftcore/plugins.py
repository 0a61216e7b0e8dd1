"""Plugins: outside modules that register methods, stages and formats, imported only when the process allows them by name.

In: a recipe's `plugins:` and the allow-list FTCORE_PLUGINS. Out: imported modules, or ConfigError. Runs in: everywhere a recipe is read.

A recipe is data and may come from anyone; what it may make a process import is decided by whoever starts the process.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence

from ftcore.errors import ConfigError

VARIABLE = "FTCORE_PLUGINS"
MODULE = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


def allowed_plugins() -> tuple[str, ...]:
    """The allow-list: comma-separated module names; `acme` allows `acme` and everything under it."""
    return tuple(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())


def import_plugins(names: object, allowed: Sequence[str] | None = None, where: str = "plugins") -> None:
    """Imports each module named in a recipe. Raises ConfigError for one that is not allowed or cannot be imported."""
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and MODULE.match(name) for name in names):
        raise ConfigError("`plugins` must be a list of Python module names", where=where, got=repr(names), wanted="[acme.methods]")
    allow_list = tuple(allowed) if allowed is not None else allowed_plugins()
    for name in names:
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in allow_list):
            raise ConfigError(
                "this process does not allow that plugin",
                where=where,
                got=name,
                wanted=", ".join(allow_list) or "no plugin: the allow-list is empty",
                remedy=f"if you trust its code, start with {VARIABLE}={','.join([*allow_list, name])}",
            )
        try:
            importlib.import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                "a plugin could not be imported",
                where=f"{where}: {name}",
                got=f"{type(error).__name__}: {error}",
                remedy="fix or remove the plugin",
            ) from error
