"""Encode: item -> Examples, and what happens to one longer than `max_length`.

In: an item, the recipe's stage, an open Chat. Out: Examples no longer than `max_length`. Runs in: Ray Data tasks; no torch.

overlong = truncate: the end is cut off; an example left without labels is refused.
split (text): windows of `max_length`, each token in one of them. split (conversation): runs of whole exchanges that fit, each with the
leading system turns again, every answer a label once; one exchange longer than that alone becomes token windows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ftcore.data.chat import Chat
from ftcore.data.types import ROLES, Conversation, Example, Item, Message
from ftcore.errors import DataError
from ftcore.recipe import Data

if TYPE_CHECKING:
    from ftcore.stages.base import Stage

_ASSISTANT = ROLES.index("assistant")
TOO_LONG = "longer than max_length"


class OverlongRefused(DataError):
    """A row longer than `max_length` under `overlong: refuse`: the run must stop, the row is not merely rejected."""


def encode_item(item: Item, stage: Stage, chat: Chat, data: Data) -> list[Example]:
    """Examples of one item, each at most `max_length` tokens.

    Raises DataError (`what` is the reason) for an item to be rejected, OverlongRefused where the recipe refuses long ones.
    """
    examples = stage.encode(item, chat)
    limit = data.max_length
    longest = max((len(example.ids) for example in examples), default=0)
    if longest <= limit:
        kept = examples
    elif data.overlong == "refuse":
        raise OverlongRefused(
            "a row is longer than data.max_length and data.overlong is `refuse`",
            where=item.origin,
            got=f"{longest} tokens",
            wanted=f"at most {limit}",
            remedy="raise data.max_length, or set data.overlong to truncate, split or drop",
        )
    elif data.overlong == "drop":
        raise DataError(TOO_LONG, got=f"{longest} tokens", wanted=f"at most {limit}")
    elif data.overlong == "split" and len(examples) == 1:
        kept = _exchanges(item, stage, chat, limit) if isinstance(item, Conversation) else windows(examples[0], limit, chat.stop_ids)
    else:
        kept = [truncate(example, limit, chat.stop_ids) for example in examples]
    if any(example.num_trained == 0 for example in kept) or not kept:
        cut = any(example.truncated for example in kept)
        raise DataError("no labels within max_length" if cut else "no labels", got=f"{longest} tokens, none of them trained")
    return kept


def truncate(example: Example, limit: int, stop_ids: tuple[int, ...]) -> Example:
    """The first `limit` tokens; `truncated` when labels were lost with the rest."""
    if len(example.ids) <= limit:
        return example
    lost = bool(example.mask[limit:].any())
    short = replace(example, ids=example.ids[:limit], mask=example.mask[:limit], roles=example.roles[:limit], truncated=lost)
    return recount(short, stop_ids)


def windows(example: Example, limit: int, stop_ids: tuple[int, ...]) -> list[Example]:
    """Cuts an example into stretches of `limit` tokens; those without a label are left out. A window's first token is no label."""
    cuts = []
    for start in range(0, len(example.ids), limit):
        mask = example.mask[start : start + limit].copy()
        mask[:1] = 0
        window = replace(example, ids=example.ids[start : start + limit], mask=mask, roles=example.roles[start : start + limit])
        if window.num_trained:
            cuts.append(recount(window, stop_ids))
    return cuts


def recount(example: Example, stop_ids: tuple[int, ...]) -> Example:
    """Answers and stops counted again after a cut: runs of trained assistant tokens, and those that end in a stop token."""
    if not example.num_answers:
        return example
    spoken = (example.roles == _ASSISTANT) & (example.mask == 1)
    lasts = np.flatnonzero(spoken & ~np.append(spoken[1:], False))
    return replace(example, num_answers=len(lasts), num_stopped=int(np.isin(example.ids[lasts], stop_ids).sum()))


def _exchanges(item: Conversation, stage: Stage, chat: Chat, limit: int) -> list[Example]:
    """Whole exchanges, as many as fit, in order."""
    system, exchanges = _split_turns(item.messages)
    kept: list[Example] = []
    group: list[Message] = []
    best: Example | None = None
    for exchange in exchanges:
        longer = _encode(item, [*system, *group, *exchange], stage, chat)
        if len(longer.ids) <= limit:
            group, best = [*group, *exchange], longer
            continue
        if best is not None:
            kept.append(best)
        alone = _encode(item, [*system, *exchange], stage, chat)
        group, best = (list(exchange), alone) if len(alone.ids) <= limit else ([], None)
        if best is None:
            kept += windows(alone, limit, chat.stop_ids)
    return [example for example in [*kept, *([best] if best is not None else [])] if example.num_trained]


def _encode(item: Conversation, messages: list[Message], stage: Stage, chat: Chat) -> Example:
    return stage.encode(replace(item, messages=tuple(messages)), chat)[0]


def _split_turns(messages: tuple[Message, ...]) -> tuple[list[Message], list[list[Message]]]:
    """Leading system turns, then exchanges: from a user turn up to the next one."""
    first = next(i for i, message in enumerate(messages) if message.role != "system")
    exchanges: list[list[Message]] = []
    for message in messages[first:]:
        if message.role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges
