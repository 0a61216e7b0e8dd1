"""Method: what moves. One file each in this folder; a method is both its configuration and its behaviour.

In: a loaded model. Out: the same model with some parameters trainable, and a folder that holds exactly those. Runs in: train workers.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftcore.registry import Registry
from ftcore.section import Choice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

METHODS: Registry[type[Method]] = Registry("method", "ftcore.methods")


class Method(Choice):
    """What is trainable, how it is saved and merged."""

    servable: ClassVar[bool] = False
    """The serving engines can hold many of these over one base."""
    mergeable: ClassVar[bool] = False
    """`merge` folds it into the base."""
    is_adapter: ClassVar[bool] = False
    """What is saved is a small PEFT folder over a base, not a whole model."""
    quantises: ClassVar[bool] = False
    """The base is held in 8 or 4 bits (what a backend that shards the base's weights cannot take)."""
    keeps_base: ClassVar[bool] = True
    """The base stays underneath: `without` can give it back (what a stage that needs a reference relies on)."""

    def load_options(self) -> dict[str, Any]:
        """Extra keyword arguments for `from_pretrained` (quantisation, for one)."""
        return {}

    def loaded(self, model: nn.Module, dtype: str) -> None:
        """Called once on a base just loaded with `load_options`, before anything runs through it. `dtype`: what is not quantised is in."""

    def held(self, dtype: str) -> str:
        """What the base's weights are held in, as probes name it: `dtype`, or a quantised form (`nf4`, `int8`)."""
        return dtype

    def quantisation(self, dtype: str) -> str:
        """How the base is quantised, for cards."""
        return "none"

    def in_fp32(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model computes in fp32 with its weights as they are held: what any other device gives too."""
        from ftcore.plain_forward import computed_in_fp32

        return computed_in_fp32(model)

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Returns the model to train: the right parameters require gradients and no others. Their fp32 masters
        are the backend's business. Raises ModelError when nothing would move."""

    def resume(self, model: nn.Module, folder: Path) -> nn.Module:
        """Like `apply`, starting from weights saved in `folder` (a checkpoint or an adapter this run continues from)."""
        trained = self.apply(model)
        self.load(trained, folder)
        return trained

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called on every rank after each optimizer step (AdaLoRA's budget, for one)."""

    @abstractmethod
    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model behaves as the untouched base. Raises ModelError where it cannot."""

    @abstractmethod
    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes `weights` (the stepper's `whole()`: every trainable parameter, by its name in `model`) so that `load` can read them.
        safetensors only."""

    def export(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes the result as plain PEFT or transformers read it; raises IntegrityError when what is read back is not `weights`."""
        self.save(model, weights, folder)

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> None:
        """Puts saved weights into an applied model. Raises IntegrityError unless every tensor binds exactly."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Returns a plain transformers model with the method folded in."""
        from ftcore.errors import ModelError

        raise ModelError(f"method `{self.kind}` cannot be merged", remedy="publish it as an adapter instead")
