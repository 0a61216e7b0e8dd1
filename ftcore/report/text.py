"""Text: makes any string from rows, recipes and models safe to look at: control characters, ANSI escapes and bidi marks become visible signs.

In: strings nobody vouches for. Out: strings that cannot move the cursor, reorder the line or hide. Runs in: everywhere.

HTML escaping is the template's (autoescape); Markdown is the card's. This comes before both.
"""

from __future__ import annotations

import unicodedata

KEPT = {"\n", "\t"}


def visible(text: object) -> str:
    """Every control, format (bidi, zero-width), surrogate and private character written as a sign: ESC as ␛, U+202E as ⟨U+202E⟩.

    Newline and tab stay; joiners that emoji and Indic scripts need (U+200C, U+200D) stay too.
    """
    return "".join(_sign(char) for char in str(text))


def _sign(char: str) -> str:
    if char.isprintable() or char in KEPT or char in "\u200c\u200d":
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(char) in ("Zs", "Cn"):  # wide spaces; letters newer than this Python's tables
        return char
    return f"⟨U+{code:04X}⟩"
