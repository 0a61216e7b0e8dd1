"""Every error the library raises on purpose, as one tree.

In: what, where, got, wanted, remedy. Out: a message a person can act on. Runs in: everywhere; imports nothing.

    FtcoreError
    ├── ConfigError     (ValueError)    the recipe or a command line is wrong           exit code 2
    ├── DataError       (ValueError)    rows, files or the audit of them                exit code 3
    ├── ModelError      (ValueError)    a base model, tokenizer or method does not fit  exit code 4
    ├── StorageError    (OSError)       a path cannot be read or written                exit code 5
    ├── IntegrityError  (ValueError)    what was read back is not what was written      exit code 6
    ├── ClusterError    (RuntimeError)  Ray, nodes, resources                           exit code 7
    ├── TrainingError   (RuntimeError)  the run itself failed (not finite, killed)      exit code 8
    └── Interrupted     (RuntimeError)  stopped by the user or the platform; resumable  exit code 75 (EX_TEMPFAIL)

A shut gate is no error: `ftcore sft` says so last, and exits with 9.
"""

from __future__ import annotations


class FtcoreError(Exception):
    """Base of all deliberate errors; `str(error)` is the whole message for people.

    `what` is one clause; `where` the file, row, key or object; `got` and `wanted` the facts; `remedy` what to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", got: object = "", wanted: object = "", remedy: str = "") -> None:
        self.what, self.where, self.got, self.wanted, self.remedy = what, str(where), str(got), str(wanted), remedy
        super().__init__(what, self.where, self.got, self.wanted, remedy)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name + ':':<8}{text}" for name, text in self.facts().items() if text]
        return "\n".join(lines)

    def facts(self) -> dict[str, str]:
        return {"where": self.where, "got": self.got, "wanted": self.wanted, "remedy": self.remedy}

    def __reduce__(self) -> tuple[object, ...]:  # Ray sends errors between processes; keyword arguments do not survive the default
        return _rebuild, (type(self), self.what, self.facts())


def _rebuild(kind: type[FtcoreError], what: str, facts: dict[str, str]) -> FtcoreError:
    return kind(what, **facts)


class ConfigError(FtcoreError, ValueError):
    exit_code = 2


class DataError(FtcoreError, ValueError):
    exit_code = 3


class ModelError(FtcoreError, ValueError):
    exit_code = 4


class StorageError(FtcoreError, OSError):
    exit_code = 5

    def __reduce__(self) -> tuple[object, ...]:  # the number decides whether a retry is worth it, also in the driver
        return *super().__reduce__(), {"errno": self.errno}

    def __str__(self) -> str:  # OSError has a __str__ of its own
        return FtcoreError.__str__(self)


class IntegrityError(FtcoreError, ValueError):
    exit_code = 6


class ClusterError(FtcoreError, RuntimeError):
    exit_code = 7


class TrainingError(FtcoreError, RuntimeError):
    exit_code = 8


class Interrupted(FtcoreError, RuntimeError):
    exit_code = 75
