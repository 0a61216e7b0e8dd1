"""Terminal: pairs shown one by one, a key a judgement; from a pipe a word a line.

In: a Desk, keys. Out: pairs on stdout. Runs in: a person's terminal. Texts are shown with their control characters written out.
"""

from __future__ import annotations

import os
import shutil
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ftcore.data.audit_table import printable_lines
from ftcore.feedback.desk import Desk, Shown
from ftcore.feedback.judgements import HIGHEST, LOWEST

CHOOSING = "a: the first   b: the second   t: as good   s: skip   u: undo   q: quit"
SCORING = f"two digits {LOWEST}-{HIGHEST}: the first's score, the second's   s: skip   u: undo   q: quit"
ENDS = ("q", "\x04")
"""Ctrl-D too, which a terminal hands out as a key."""


def sit(desk: Desk) -> None:
    """Until everything is judged, or q."""
    with _keys() as read:
        while (shown := desk.current) is not None:
            print(text_of(shown, scored=desk.scored), flush=True)
            while True:
                key = _word(read, scored=desk.scored)
                if key in ENDS:
                    return
                if desk.press(key):
                    break
                print("nothing to undo" if key == "u" else f"no such key: {printable_lines(key)}", flush=True)


def text_of(shown: Shown, *, scored: bool) -> str:
    rule = "─" * min(100, shutil.get_terminal_size().columns)
    turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in shown.prompt)
    labels = (f"[{shown.number} of {shown.total}]", turns, "── A", shown.first, "── B", shown.second)
    return printable_lines("\n".join([rule, *labels, rule, SCORING if scored else CHOOSING]))


def _word(read: Callable[[], str], *, scored: bool) -> str:
    """What was pressed; in scoring two digits, which may come one by one (anything else in between stands for itself)."""
    word = _pressed(read)
    if not (scored and len(word) == 1 and word.isdigit()):
        return word
    second = _pressed(read)
    return word + second if second.isdigit() else second


def _pressed(read: Callable[[], str]) -> str:
    raw = read()
    return raw.strip().lower() if raw else "q"  # the end of a pipe


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """What reads the next key: at once from a terminal, a line from a pipe."""
    if not sys.stdin.isatty():
        yield sys.stdin.readline
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield lambda: os.read(number, 32).decode(errors="replace")  # whole: an arrow key's escape sequence ends in a letter
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
