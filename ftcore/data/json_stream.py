"""JSON stream: the objects of a JSON file one at a time, however large the file, holding one of them in memory.

In: a binary stream: `[ {...}, {...} ]`, one object, or several after one another. Out: parsed values in order. Runs in: Ray Data tasks.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from ftcore.errors import DataError

CHUNK_BYTES = 1 << 20
_MARKS = re.compile(r'["\\{}\[\]]')
_BLANK = " \t\n\r"
_NEAR_END = 64
"""A syntax error this close to the end of what was read so far may only mean that more is needed."""


class TooLong:
    """Stands for a value that is longer than the limit and was skipped."""


class JsonStream:
    """Pulls values from a stream. `max_chars` bounds one value; a longer one is skipped unparsed and yields TooLong."""

    def __init__(self, file: IO[bytes], label: str, max_chars: int) -> None:
        self._file, self._label, self._max_chars = file, label, max_chars
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended, self._row = "", 0, False, 0

    def values(self) -> Iterator[Any]:
        first = self._peek()
        in_array = first == "["
        if in_array:
            self._at += 1
            if self._peek() == "]":
                return
        while self._peek():
            self._row += 1
            yield self._value()
            mark = self._peek()
            if in_array and mark == ",":
                self._at += 1
                if self._peek() == "]":
                    raise self._broken("a comma before the closing bracket")
            elif in_array and mark == "]":
                self._at += 1
                if self._peek():
                    raise self._broken("text after the closing bracket")
                return
            elif in_array and mark:
                raise self._broken(f"{mark!r} where a comma or the closing bracket belongs")
        if in_array:
            raise self._broken("the file ends inside the array: it was cut off")

    def _value(self) -> Any:
        step = CHUNK_BYTES
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError:
                raise self._broken("nested too deeply") from None
            except ValueError as error:
                known = isinstance(error, json.JSONDecodeError)
                position, message = (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (self._at, str(error))
                partial = known and (message.startswith("Unterminated string") or position >= len(self._text) - _NEAR_END)
                if self._ended or not partial:
                    raise self._broken(f"{message} ({_around(self._text, position)})") from None
            else:
                if self._ended or end < len(self._text):  # a number at the very end may go on
                    self._at = end
                    return value
            if len(self._text) - self._at > self._max_chars:
                self._skip()
                return TooLong()
            self._more(step)
            step *= 2  # so that one long value is parsed only a few times over

    def _skip(self) -> None:
        """Moves past a value without building it, by brackets and quotes alone."""
        depth, in_string = 0, False
        while True:
            mark = _MARKS.search(self._text, self._at)
            if mark is None:
                self._text, self._at = "", 0
            else:
                self._at = mark.end()
                sign = mark.group()
                if sign == "\\" and in_string:
                    if self._at >= len(self._text):
                        self._text, self._at = "", 0
                        self._more(CHUNK_BYTES)
                    self._at += 1
                    continue
                if sign == '"':
                    in_string = not in_string
                elif not in_string and sign in "{[":
                    depth += 1
                elif not in_string and sign in "}]":
                    depth -= 1
                if depth == 0 and not in_string:
                    return
            if self._at >= len(self._text):
                if self._ended:
                    raise self._broken("the file ends inside this row: it was cut off")
                self._text, self._at = "", 0
                self._more(CHUNK_BYTES)

    def _peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more(CHUNK_BYTES)

    def _more(self, num_bytes: int) -> None:
        chunk = self._file.read(num_bytes)
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, self._ended)
        self._at = 0

    def _broken(self, got: str) -> DataError:
        return DataError(
            "broken JSON",
            where=f"{self._label}, row {self._row or 1}",
            got=got,
            wanted="a JSON array of objects, or objects one after another",
            remedy="mend the file there; nothing after it can be read",
        )


def _around(text: str, position: int) -> str:
    return "near " + repr(text[max(0, position - 20) : position + 20])
