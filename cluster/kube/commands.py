"""Commands: what `ftcore k8s` can do; its first word chooses.

In: a command line. Out: the exit code of the command. Runs in: a terminal, CI; imports no ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches

from cluster.kube import lint
from ftcore.errors import ConfigError

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "lint": (lint.main, "PATH...   check manifests as strictly as a cluster would, offline"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: ftcore k8s COMMAND ...\n\ncommands:")
        print("\n".join(f"  {name} {usage}" for name, (_, usage) in COMMANDS.items()))
        print("\n`ftcore k8s COMMAND --help` says more.")
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, n=1)
        remedy = f"did you mean `ftcore k8s {near[0]}`?" if near else "`ftcore k8s --help` lists the commands"
        raise ConfigError("unknown command", where="ftcore k8s", got=argv[0], wanted=" | ".join(COMMANDS), remedy=remedy)
    return COMMANDS[argv[0]][0](argv[1:])
