"""Turns: where each message of a conversation lies in the text a chat template makes of it.

In: a Jinja template, messages. Out: the rendered text and one Span of characters per message. Runs in: Ray Data tasks; no torch.

A template is a program; it may trim, inject a default system turn, or drop earlier thinking. So nothing is guessed from its source.
For each *shape* of conversation (its roles) it is rendered once over sentinel words, which shows the fixed text between turns; a real
row must then equal that text with its contents filled in, character by character, or its turns are found by rendering parts of the row
itself. What cannot be found exactly raises DataError: a wrong mask is worse than a lost row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftcore.errors import DataError

Render = Callable[[list[dict[str, Any]], bool], str]
"""(messages, add_generation_prompt) -> text; raises DataError when the template refuses the messages."""

CANNOT_SPLIT = "the chat template cannot be split into turns for this row"
LEFT, RIGHT = " \n\n ", " \n\n "
_SHAPES_KEPT = 512


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of the text that message wrote: for an assistant turn everything the model has to say after the generation
    prompt, its stop token included; for other turns the content alone. `stopped`: it ends in a stop token; `stop` is that token's text."""

    start: int
    end: int
    stop: str = ""

    @property
    def stopped(self) -> bool:
        return bool(self.stop)


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed text of one shape of conversation. gaps: what stands before each content and after the last one (n + 1 of them).

    strips: (left, right) per message, whether the template trims there; leads: characters before the content that the model says
    itself; trails: characters after the content up to the end of the span; stops: the stop token's text or "".
    """

    gaps: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]
    leads: tuple[int, ...]
    trails: tuple[int, ...]
    stops: tuple[str, ...]

    def fill(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
        parts, spans, at = [], [], 0
        for i, message in enumerate(messages):
            content = message["content"]
            left, right = self.strips[i]
            content = content.lstrip() if left else content
            content = content.rstrip() if right else content
            parts += [self.gaps[i], content]
            start = at + len(self.gaps[i])
            at = start + len(content)
            spans.append(Span(start - self.leads[i], at + self.trails[i], self.stops[i]))
        parts.append(self.gaps[-1])
        return "".join(parts), spans


class Turns:
    """Finds the turns; one per (template, tools). `control` are the tokenizer's special tokens, as text."""

    def __init__(self, render: Render, control: Sequence[str]) -> None:
        self.render = render
        alternatives = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True) if token)
        self._control = re.compile(f"({alternatives})" if alternatives else r"(?!)")
        self._shapes: dict[tuple[str, ...], Shape | None] = {}

    def find(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The rendered text and a Span per message."""
        text = self.render(messages, False)
        if not any("tool_calls" in message for message in messages):
            shape = self.shape(tuple(message["role"] for message in messages))
            if shape is not None:
                filled, spans = shape.fill(messages)
                if filled == text:
                    return text, spans
        return text, self._by_rendering(messages, text)

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The messages and the generation prompt. A template that has none lends the header it writes before an answer."""
        text, plain = self.render(messages, True), self.render(messages, False)
        if text != plain:
            return text
        word = _word(0)
        header = self.render([*messages, {"role": "assistant", "content": word}], False).partition(word)[0]
        return header if header.startswith(plain) and header[len(plain) :].strip() else text

    def shape(self, roles: tuple[str, ...]) -> Shape | None:
        if roles not in self._shapes:
            if len(self._shapes) >= _SHAPES_KEPT:
                self._shapes.clear()
            self._shapes[roles] = self._learn(roles)
        return self._shapes[roles]

    def _learn(self, roles: tuple[str, ...]) -> Shape | None:
        """Renders sentinels; None where the template does not keep them whole, once each and in order."""
        words = [_word(i) for i in range(len(roles))]
        messages: list[dict[str, Any]] = [{"role": role, "content": LEFT + word + RIGHT} for role, word in zip(roles, words, strict=True)]
        try:
            text = self.render(messages, False)
        except DataError:
            return None  # the row's own rendering says why
        gaps, strips, at = [], [], 0
        for word in words:
            found = text.find(word, at)
            if found < 0 or text.count(word) != 1:
                return None
            gap, rest = text[at:found], text[found + len(word) :]
            keeps_left, keeps_right = gap.endswith(LEFT), rest.startswith(RIGHT)
            gaps.append(gap.removesuffix(LEFT))
            strips.append((not keeps_left, not keeps_right))
            at = found + len(word) + (len(RIGHT) if keeps_right else 0)
        gaps.append(text[at:])
        leads, trails, stops = [0] * len(roles), [0] * len(roles), [""] * len(roles)
        for i, role in enumerate(roles):
            if role != "assistant":
                continue
            before = self._after_word(messages[:i], words[i - 1] if i else "", strips[i - 1][1] if i else True, True)
            plain = self._after_word(messages[:i], words[i - 1] if i else "", strips[i - 1][1] if i else True, False)
            leads[i] = len(gaps[i]) - _header(gaps[i], before, plain)
            own = self._after_word(messages[: i + 1], words[i], strips[i][1], False) or ""
            trails[i], stops[i] = self._stop(gaps[i + 1], len(own) if gaps[i + 1].startswith(own) else 0)
        return Shape(tuple(gaps), tuple(strips), tuple(leads), tuple(trails), tuple(stops))

    def _after_word(self, messages: list[dict[str, Any]], word: str, stripped: bool, generation_prompt: bool) -> str | None:
        """What the template writes after the last sentinel when the conversation ends there; None when it refuses to."""
        if not messages:
            return None
        try:
            text = self.render(messages, generation_prompt)
        except DataError:
            return None
        _, found, rest = text.rpartition(word)
        return (rest if stripped else rest.removeprefix(RIGHT)) if found else None

    def _stop(self, after: str, own: int) -> tuple[int, str]:
        """How far a span reaches into the text after its content, and the stop token found there.

        `own`: characters of `after` that the turn writes itself (the rest is the next turn's header). A control token in its own part
        is the stop; so is one that follows at once, such as GLM's <|user|>; without either the turn's own text belongs to it whole.
        """
        inside = self._control.search(after, 0, own)
        if inside is None:
            blank = len(after) - len(after.lstrip())
            inside = self._control.match(after, blank) if own <= blank else self._control.match(after, own)
        return (inside.end(), inside.group()) if inside else (own, "")

    def _by_rendering(self, messages: list[dict[str, Any]], text: str) -> list[Span]:
        """Slower, for rows whose contents the template rewrites: two to four renderings per assistant turn."""
        answers = {i: self._answer(messages, i, text) for i, message in enumerate(messages) if message["role"] == "assistant"}
        spans: list[Span] = []
        at = 0
        for i, message in enumerate(messages):
            span = answers.get(i)
            if span is None:  # colours the audit only; a text the template rewrote is left to the template
                limit = next((answers[later].start for later in answers if later > i), len(text))
                content = message["content"].strip()
                found = text.find(content, at, limit)
                span = Span(found, found + len(content)) if found >= 0 else Span(at, at)
            elif span.start < at:
                raise DataError(CANNOT_SPLIT, got=f"turn {i + 1} (assistant) overlaps the turn before it")
            spans.append(span)
            at = span.end
        return spans

    def _answer(self, messages: list[dict[str, Any]], i: int, text: str) -> Span:
        word = _word(i)
        swapped = self.render([*messages[:i], {**messages[i], "content": word}, *messages[i + 1 :]], False)
        prefix, _, suffix = swapped.partition(word)
        prompt, plain = self.render(messages[:i], True), self.render(messages[:i], False)
        if text.startswith(prompt) and (prompt != plain or not prefix[len(prompt) :].strip()):
            start = len(prompt)
        elif text.startswith(prefix):
            start = len(prefix)
        else:
            raise DataError(CANNOT_SPLIT, got=f"the text before turn {i + 1} changes with what follows it")
        whole = self.render(messages[: i + 1], False)
        if text.startswith(whole) and len(whole) > start:
            last = max(self._control.finditer(whole, start), key=re.Match.end, default=None)
            if last is not None and not whole[last.end() :].strip():
                end, stop = last.end(), last.group()
            else:
                reach, stop = self._stop(text[len(whole) :], 0)
                end = len(whole) + reach
        elif suffix and text.endswith(suffix) and "tool_calls" not in messages[i]:
            content_end = len(text) - len(suffix)
            reach, stop = self._stop(suffix, 0)
            end = content_end + reach
        else:
            raise DataError(CANNOT_SPLIT, got=f"the end of turn {i + 1} (assistant) cannot be told from what follows it")
        if end <= start:
            raise DataError("empty answer", got=f"turn {i + 1} (assistant), once the template has rewritten it")
        return Span(start, end, stop)


def _word(i: int) -> str:
    """A sentinel: one plain word, so that no template rewrites it, that no row holds."""
    return f"sentinelQx{i}x7fQ3kZ"


def _header(gap: str, prompt: str | None, plain: str | None) -> int:
    """Characters of `gap` (all text between the content before and this answer) that are given to the model, not said by it.

    Normally the generation prompt. A template that has none (`prompt == plain`) gives its header, unless only blanks are left over.
    """
    if prompt is None or not gap.startswith(prompt):
        return len(gap)
    return len(gap) if prompt == plain and gap[len(prompt) :].strip() else len(prompt)
