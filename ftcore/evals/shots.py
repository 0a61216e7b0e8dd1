"""Shots: solved conversations put in front of a question, for k-shot prompting.

In: a conversation, examples. Out: the conversation after them. Runs in: everywhere; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftcore.data.types import Conversation, Message


def prompted(conversation: Conversation, examples: Sequence[Conversation]) -> Conversation:
    """The conversation after some solved ones of the same user where there are any; nothing of the examples is scored."""
    lead = [m for m in conversation.messages if m.role == "system"]
    alike = [e for e in examples if [m for m in e.messages if m.role == "system"] == lead] or list(examples)
    before: list[Message] = [replace(m, weight=0) for example in alike for m in example.messages if m.role != "system"]
    rest = [m for m in conversation.messages if m.role != "system"]
    return replace(conversation, messages=(*lead, *before, *rest))
