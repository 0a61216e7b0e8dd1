"""pretrain: next-token cross-entropy on plain documents (continued pre-training).

In: Texts. Out: Examples; a summed cross-entropy. Runs in: Ray Data tasks, train workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ftcore.data.types import Example, Item, Text
from ftcore.stages.base import STAGES, Loss, Models, Stage

if TYPE_CHECKING:
    from ftcore.data.chat import Chat
    from ftcore.data.collate import Batch


@STAGES.register("pretrain")
class Pretrain(Stage):
    """Continued pre-training on text: every token but the first is learnt, the end-of-text token too."""

    kind: str = "pretrain"
    item: ClassVar[type] = Text

    def encode(self, item: Item, chat: Chat) -> list[Example]:
        assert isinstance(item, Text)
        return [chat.encode_text(item)]

    def loss(self, models: Models, batch: Batch) -> Loss:
        return Loss(models.policy.cross_entropy(batch))
