"""Shapes: events of an answer in the two shapes that OpenAI's clients read, whole or streamed.

In: Pieces and a Closing. Out: JSON bodies. Runs in: the ingress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from ftcore.receipts import said_vector
from ftcore.tool_calls import CallPart, whole_calls
from serving.jobs import Closing, Event, Piece, TokenInfo, Vector

Shape = Callable[[str, str, int, str], "Writer"]


class Writer(ABC):
    """One answer. A shape says how a piece and a whole choice look."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, job: str, model: str, created: int, fingerprint: str) -> None:
        self._common = {"id": f"{self.prefix}{job}", "created": created, "model": model, "system_fingerprint": fingerprint}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a stream sends before a choice's first text, if anything."""
        return None

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def choice(self, index: int, text: str, calls: Sequence[CallPart], tokens: Sequence[TokenInfo], finish: str) -> dict[str, Any]: ...

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        pieces = [event for event in events if isinstance(event, Piece)]
        closing = next(event for event in events if isinstance(event, Closing))
        choices = []
        for index in range(max(piece.choice for piece in pieces) + 1):
            own = [piece for piece in pieces if piece.choice == index]
            tokens = [token for piece in own for token in piece.tokens]
            calls = whole_calls([part for piece in own for part in piece.calls])
            choices.append(self.choice(index, "".join(piece.text for piece in own), calls, tokens, own[-1].finish or "stop"))
        return {**self._common, "object": self.kind, "choices": choices, "usage": _usage(closing), "ftcore_receipt": closing.receipt}

    async def stream(self, events: AsyncGenerator[Event, None], usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The end of a choice waits for what follows: the last one carries the receipt. Without `usage` every chunk has a choice."""
        common = {**self._common, "object": self.chunk_kind}
        begun: set[int] = set()
        end: dict[str, Any] | None = None
        async with aclosing(events):
            try:
                async for event in events:
                    if end is not None:
                        yield {**end, "ftcore_receipt": event.receipt} if isinstance(event, Closing) else end
                        end = None
                    if isinstance(event, Piece):
                        if event.choice not in begun:
                            begun.add(event.choice)
                            if (first := self.opening(event.choice)) is not None:
                                yield {**common, "choices": [first]}
                        chunk = {**common, "choices": [self.delta(event)]}
                        if event.finish is None:
                            yield chunk
                        else:
                            end = chunk
                    elif isinstance(event, Closing) and usage:
                        yield {**common, "choices": [], "usage": _usage(event)}
            except Exception:
                if end is not None:
                    yield end
                raise


class _Chat(Writer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self, choice: int) -> dict[str, Any]:
        return {"index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": part.index, **_call(part)} for part in piece.calls]
        return {"index": piece.choice, "delta": delta, "logprobs": _chat_logprobs(piece.tokens), "finish_reason": piece.finish}

    def choice(self, index: int, text: str, calls: Sequence[CallPart], tokens: Sequence[TokenInfo], finish: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {"index": index, "message": message, "logprobs": _chat_logprobs(tokens), "finish_reason": finish}


class _Text(Writer):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, job: str, model: str, created: int, fingerprint: str) -> None:
        super().__init__(job, model, created, fingerprint)
        self._said: Counter[int] = Counter()
        """Choice -> characters of its tokens that were sent."""

    def delta(self, piece: Piece) -> dict[str, Any]:
        start = self._said[piece.choice]
        self._said[piece.choice] += sum(len(token.text) for token in piece.tokens)
        return {"index": piece.choice, "text": piece.text, "logprobs": _text_logprobs(piece.tokens, start), "finish_reason": piece.finish}

    def choice(self, index: int, text: str, calls: Sequence[CallPart], tokens: Sequence[TokenInfo], finish: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": _text_logprobs(tokens), "finish_reason": finish}


def chat_shape(job: str, model: str, created: int, fingerprint: str) -> Writer:
    return _Chat(job, model, created, fingerprint)


def text_shape(job: str, model: str, created: int, fingerprint: str) -> Writer:
    return _Text(job, model, created, fingerprint)


def embeddings_body(events: Sequence[Event], model: str, encoding: str) -> dict[str, Any]:
    """OpenAI's clients ask for base64 and show numbers."""
    rows = []
    for event in events:
        if isinstance(event, Vector):
            values: Any = said_vector(event.values) if encoding == "base64" else list(memoryview(event.values).cast("f"))
            rows.append({"object": "embedding", "index": event.index, "embedding": values})
    closing = next(event for event in events if isinstance(event, Closing))
    usage = {"prompt_tokens": closing.prompt_tokens, "total_tokens": closing.prompt_tokens}
    return {"object": "list", "data": rows, "model": model, "usage": usage, "ftcore_receipt": closing.receipt}


def _call(part: CallPart) -> dict[str, Any]:
    """A call, or in a stream its beginning or more of its arguments."""
    if not part.name:
        return {"function": {"arguments": part.arguments}}
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _usage(closing: Closing) -> dict[str, int]:
    return {
        "prompt_tokens": closing.prompt_tokens, "completion_tokens": closing.completion_tokens,
        "total_tokens": closing.prompt_tokens + closing.completion_tokens,
    }  # fmt: skip


def _chat_logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
    if not tokens:
        return None

    def one(text: str, logprob: float) -> dict[str, Any]:
        whole = "\ufffd" not in text  # else a part of a character, whose own bytes did not come with it
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    content = [{**one(token.text, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[TokenInfo], start: int = 0) -> dict[str, Any] | None:
    if not tokens:
        return None
    offsets = list(accumulate((len(token.text) for token in tokens), initial=start))[:-1]
    return {
        "tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens], "text_offset": offsets,
    }  # fmt: skip
