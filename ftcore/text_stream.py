"""Text stream: tokens as text, piece by piece, never half a character and never a stop string or the beginning of one.

In: token ids, one by one. Out: text that may be shown now. Runs in: serving replicas, `ftcore chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """One answer's text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), keep_special: bool = False) -> None:
        """`keep_special`: special tokens are part of the text."""
        self._tokenizer, self._stops = tokenizer, tuple(stop for stop in stops if stop)
        self._skip_special = not keep_special
        self._ids: list[int] = []
        self._begin = self._shown = 0
        self._held = ""
        self.stopped = False
        """A stop string came up; nothing follows."""

    def push(self, token: int) -> str:
        """The text that this token adds and that may be shown."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._shown])
        now = self._decode(self._ids[self._begin :])
        if now.endswith(HALF) and len(self._ids) - self._shown < 8:
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return self._release(now[len(before) :])

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._shown])
        rest = self._decode(self._ids[self._begin :])[len(before) :]
        text = self._release(rest)
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)[0]], ""
            return text
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False))
