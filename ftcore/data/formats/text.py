"""text: `{text: "..."}`, a document for continued pre-training (text files become such rows).

In: Row. Out: Text. Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore.data.formats.base import format, text_of
from ftcore.data.types import Row, Text
from ftcore.errors import DataError

_KEYS = ("text", "content")


def _recognises(value: Mapping[str, Any]) -> str:
    return next((f"it has a string `{key}`" for key in _KEYS if isinstance(value.get(key), str)), "")


@format("text", item=Text, recognises=_recognises)
def text(row: Row) -> Text:
    key = next((key for key in _KEYS if key in row.value), None)
    if key is None:
        raise DataError("missing key", got="no `text`", wanted="text: a string")
    content = text_of(row.value[key], f"`{key}`")
    if not content.strip():
        raise DataError("empty text")
    return Text(content, row.origin)
