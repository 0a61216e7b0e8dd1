"""Stage: what it learns from. Turns items into Examples before training and batches into a loss while training.

In: items; then batches. Out: Examples; then a *sum* over the batch and the weight to divide it by. Runs in: Ray Data tasks, train workers.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ftcore.data.types import Conversation, Example, Item
from ftcore.registry import Registry
from ftcore.section import Choice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftcore.data.chat import Chat
    from ftcore.data.collate import Batch
    from ftcore.methods.base import Method
    from ftcore.models import CausalModel

STAGES: Registry[type[Stage]] = Registry("stage", "ftcore.stages")


@dataclass
class Models:
    """Who takes part in a stage's loss. `reference` is the untouched base (for a PEFT method: the policy with its adapter switched off)."""

    policy: CausalModel
    reference: CausalModel | None = None


@dataclass
class Loss:
    """`total`: a scalar sum over the batch (never a mean). `sums`: further sums to report, each divided by the same weight."""

    total: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


class Stage(Choice):
    """What it learns from, and the loss."""

    packs: ClassVar[bool] = True
    """Examples may be laid end to end with others in a block. False: an item's examples make one block of their own, in order."""
    item: ClassVar[type] = Conversation
    """The kind of item a format must make of a row (ftcore.data.types)."""
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def encode(self, item: Item, chat: Chat) -> list[Example]:
        """Item -> Examples (one for most stages; chosen and rejected for a pairwise one). Raises DataError for a row to reject."""

    def models(self, policy: CausalModel, method: Method, model: nn.Module) -> Models:
        """Gathers who takes part; called once, after the method is applied."""
        from ftcore.models import ReferenceModel

        return Models(policy, ReferenceModel(policy, method, model) if self.needs_reference else None)

    def experience(self, models: Models, batches: list[Batch]) -> list[Batch]:
        """Offline stages train on what was prepared; online ones roll out here."""
        return batches

    def weight(self, batch: Batch) -> float:
        """What this batch adds to the window's divisor: trained tokens, unless the stage counts otherwise. Known before the forward pass.

        A batch without any trained token (a short rank's part in a window) must weigh 0, and its loss must be 0.
        """
        return float(batch.num_trained)

    @abstractmethod
    def loss(self, models: Models, batch: Batch) -> Loss:
        """The sum over the batch."""
