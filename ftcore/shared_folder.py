"""Shared folder: marks that one machine leaves in a folder and others look for, to tell whether it is the same folder to all.

In: a path or URL, names of marks. Out: which of them are seen. Runs in: every node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from ftcore.storage import Folder

HIDDEN = ".ftcore-"


def leave(url: str, mark: str) -> str:
    """Writes a mark, reads it back and returns its name. Raises StorageError."""
    folder = Folder(url)
    folder.write(HIDDEN + mark, mark.encode())
    folder.read(HIDDEN + mark)
    return mark


def find(url: str, marks: Sequence[str]) -> list[str]:
    """The marks that are seen here with the right content."""
    folder = Folder(url)
    return [mark for mark in marks if folder.exists(HIDDEN + mark) and folder.read(HIDDEN + mark) == mark.encode()]


def take_away(url: str, marks: Sequence[str]) -> None:
    """Removes marks, and the folder if nothing else was in it."""
    folder = Folder(url)
    for mark in marks:
        folder.delete(HIDDEN + mark)
    if folder.is_local:
        with contextlib.suppress(OSError):  # it holds something, or another node was first
            Path(folder.path).rmdir()
