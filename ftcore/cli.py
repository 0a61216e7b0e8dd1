"""The `ftcore` command: one dispatcher to every room. The only file of the library that may import the other rooms, and only late.

In: a command line. Out: the command's exit code (an FtcoreError's own, with its message on stderr). Runs in: a person's terminal.

`ftcore --help` and `ftcore validate` import neither torch nor ray (a test holds this).
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ftcore import __version__
from ftcore.errors import ConfigError, FtcoreError

Main = Callable[[list[str]], int | None]


@dataclass(frozen=True)
class Command:
    """One word after `ftcore`: `module:function` is imported only when it is asked for, and gets the rest of the line."""

    target: str
    usage: str
    summary: str
    extra: str = "train"
    """The optional packages it needs, for who has not installed them."""


COMMANDS: dict[str, Command] = {
    "demo": Command("pipelines.demo:main", "", "the embedded default, end to end: simulate, train, publish, compare"),
    "validate": Command(
        "ftcore.recipe_commands:validate", "RECIPE [PATH=VALUE ...]", "check a recipe; print what differs from the defaults"
    ),
    "preview": Command("ftcore.data.preview:main", "RECIPE [PATH=VALUE ...]", "show rows token by token, coloured by trained or not"),
    "plan": Command(
        "pipelines.plan:main", "RECIPE [PATH=VALUE ...] [--gpu NAME]", "memory, disk, network and time of a run before it is launched"
    ),
    "prepare": Command(
        "pipelines.prepare:main", "RECIPE [PATH=VALUE ...]", "rows to packed blocks, with the audit, before any worker starts"
    ),
    "sft": Command("pipelines.sft:main", "RECIPE [PATH=VALUE ...]", "train on Ray, verify and publish the adapter"),
    "pretrain": Command("pipelines.sft:main", "RECIPE [PATH=VALUE ...]", "the same, for a recipe with stage: pretrain"),
    "tune": Command(
        "pipelines.tune:main", "RECIPE [PATH=RANGE ...] [PATH=VALUE ...]", "search a recipe's keys; train and publish the winner"
    ),
    "doctor": Command(
        "pipelines.doctor:main", "[RECIPE] [PATH=VALUE ...]", "look at every node before a run; each finding with its remedy"
    ),
    "submit": Command("cluster.submit:main", "sft RECIPE [PATH=VALUE ...]", "run a recipe as a job of a Ray cluster, and follow it"),
    "k8s": Command("cluster.kube.commands:main", "lint PATH...|render RECIPE", "Kubernetes manifests: check them, write them", extra="k8s"),
    "adapters": Command("ftcore.adapter_commands:main", "list|show|verify|promote|...", "look after the adapter store"),
    "adapters status": Command("serving.watching:status_main", "URL", "of a running server: which replica serves which version"),
    "serve": Command("serving.commands:serve_main", "[FILE] base=... store=...", "answer over HTTP, each tenant with its own adapters"),
    "chat": Command("ftcore.chat_command:main", "[REF] [--base DIR]", "talk to an adapter, or to a bare base, in the terminal"),
    "generate": Command("pipelines.generate:main", "REF ROWS --out DIR", "answer many rows with an adapter, into Parquet"),
    "evaluate": Command(
        "pipelines.evaluate:main",
        "RECIPE --systems base NAME --out DIR",
        "judge base, k-shot, adapters, endpoints on the same held-out rows",
    ),
    "compare": Command("ftcore.evals.compare_command:main", "DIR A B", "is A better than B? in a sentence, from finished evaluations"),
    "label": Command(
        "ftcore.feedback.command:main", "DIR A B", "people say which of two answers is better; how far they agree; rows to train on"
    ),
    "tenants": Command("serving.tenant_commands:main", "add|key|rotate|list FOLDER ...", "make, rotate and revoke tenants' keys"),
    "audit": Command(
        "serving.audit_commands:main", "list|verify|usage STORE", "what was asked, by whom, and what became of it; no content"
    ),
    "verify-receipt": Command("ftcore.receipt_commands:main", "ANSWER.json --keys KEYS.json", "check which weights gave an answer"),
    "merge": Command("ftcore.adapter_commands:merge_main", "REF --out DIR", "fold an adapter into its base, reloaded and compared"),
    "schema": Command("ftcore.recipe_commands:schema", "", "JSON Schema of recipes, for editors"),
    "import-config": Command("ftcore.recipe_commands:import_config", "FILE", "an axolotl, LLaMA-Factory or torchtune config as a recipe"),
    "completion": Command("ftcore.recipe_commands:completion", "bash|zsh", "print a shell completion script"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command. `--debug` before the command shows tracebacks."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("FTCORE_DEBUG"))
    while arguments and arguments[0] == "--debug":
        debug, arguments = True, arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"ftcore {__version__}")
        return 0
    return guarded(lambda rest: dispatch(rest[0], rest[1:]), arguments, debug=debug)


def help_text() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ftcore [--debug] COMMAND ...",
            "",
            "Fine-tuning on Ray, from rows to a sealed, proven adapter.",
            "",
            "commands:",
            *lines,
            "",
            "`ftcore COMMAND --help` says more. A recipe is a YAML file; PATH=VALUE overrides a key, like optim.lr=1e-4.",
        ]
    )


def dispatch(name: str, arguments: list[str]) -> int:
    """Runs one command. Raises ConfigError for an unknown one, or one that needs a package that is not installed."""
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean `ftcore {near[0]}`?" if near else "`ftcore --help` lists the commands"
        raise ConfigError("unknown command", got=name, wanted=" | ".join(COMMANDS), remedy=remedy)
    if arguments and f"{name} {arguments[0]}" in COMMANDS:  # a word of another room's
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    command = COMMANDS[name]
    module_name, function = command.target.split(":")
    run: Main = getattr(_imported(module_name, name), function)
    return run(arguments) or 0


def _imported(module_name: str, command: str) -> object:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("ftcore", *ROOMS):
            raise ConfigError(f"`ftcore {command}` is not part of this installation", got=f"no module {error.name}") from error
        raise ConfigError(
            f"`ftcore {command}` needs a package that is not installed",
            got=f"no module {missing}",
            remedy=f"pip install 'ftcore[{COMMANDS[command].extra}]' (or `make demo`)",
        ) from error


ROOMS = ("cluster", "pipelines", "serving")


def check_rooms() -> None:
    """Our sibling packages have plain names; another package of that name earlier on the path would be run in their place."""
    home = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = find_spec(room)
        if spec is None:
            continue
        found = Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or []), ""))
        if found.resolve() != home / room:
            raise ConfigError(
                f"another package named `{room}` hides ours",
                where=found,
                wanted=home / room,
                remedy="run from another folder, take it off PYTHONPATH, or install ftcore in an environment of its own",
            )


def guarded(run: Main, arguments: list[str], *, debug: bool = False) -> int:
    """The edge of the process: errors become a message on stderr and an exit code; also for `python pipelines/....py`."""
    try:
        check_rooms()
        return run(arguments) or 0
    except FtcoreError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what is sealed stays usable; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left (`| head`); nothing more to say
        return 0
    except Exception as error:
        if debug:
            raise
        print(
            f"unexpected error: {type(error).__name__}: {error}\n  log:    {_logged()}\n  remedy: run it again with `ftcore --debug ...`",
            file=sys.stderr,
        )
        return 1


def _logged() -> str:
    """Writes the current traceback to a file; returns its path."""
    with tempfile.NamedTemporaryFile("w", prefix="ftcore-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return file.name


if __name__ == "__main__":
    sys.exit(main())
