"""sft: cross-entropy on the answers of conversations (or on everything, with `data.train_on: all`).

In: Conversations. Out: Examples; a summed cross-entropy. Runs in: Ray Data tasks, train workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ftcore.data.types import Conversation, Example, Item
from ftcore.stages.base import STAGES, Loss, Models, Stage

if TYPE_CHECKING:
    from ftcore.data.chat import Chat
    from ftcore.data.collate import Batch


@STAGES.register("sft")
class Sft(Stage):
    """Supervised fine-tuning on conversations."""

    kind: str = "sft"
    item: ClassVar[type] = Conversation

    def encode(self, item: Item, chat: Chat) -> list[Example]:
        assert isinstance(item, Conversation)
        return [chat.encode(item)]

    def loss(self, models: Models, batch: Batch) -> Loss:
        return Loss(models.policy.cross_entropy(batch))
