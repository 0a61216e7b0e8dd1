"""full: every parameter is trained.

In: a transformers model. Out: the same model, saved as a plain transformers folder. Runs in: train workers.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftcore.errors import IntegrityError, ModelError
from ftcore.methods.base import METHODS, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

WEIGHTS = "weights.safetensors"


@METHODS.register("full")
class Full(Method):
    """Full fine-tuning."""

    keeps_base: ClassVar[bool] = False

    kind: str = "full"

    def apply(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)

    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        raise ModelError("a fully fine-tuned model cannot be switched off to give the base", remedy="use a PEFT method such as `lora`")

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        """By the names the model has them: transformers' own layout renames and splits (experts, for one), and has to be converted back."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in (dict(weights) | _buffers(model)).items()}, folder / WEIGHTS)

    def load(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors, parameters = load_file(folder / WEIGHTS), dict(model.named_parameters())
        odd = sorted((parameters.keys() | _buffers(model).keys()) ^ tensors.keys())
        odd += [name for name, parameter in parameters.items() if name in tensors and tensors[name].shape != parameter.shape]
        if odd:
            raise IntegrityError(
                "the saved weights do not bind to this model", where=folder, got=f"{len(odd)} tensors differ, first {odd[0]}",
                wanted="every tensor, exactly", remedy="it was made from another base; start a new run under another name",
            )  # fmt: skip
        model.load_state_dict(tensors, strict=False)

    def export(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        model.save_pretrained(folder, state_dict=dict(weights) | _buffers(model))
        # transformers writes what the model trains with: its dtype, no cache; its users want that of the weights, and the cache
        config, dtypes = folder / "config.json", sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtypes[0], "use_cache": True}, indent=2))
        again = type(model).from_pretrained(folder, dtype="auto").state_dict()
        odd = [name for name, tensor in (dict(weights) | _buffers(model)).items() if name not in again or not again[name].equal(tensor)]
        if odd:
            raise IntegrityError(
                "the exported model does not hold what was trained", where=folder, got=f"{len(odd)} tensors differ, first {odd[0]}",
                wanted="every tensor, exactly", remedy="the last checkpoint holds them by their own names; please report the architecture",
            )  # fmt: skip


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the weights (an MoE router's correction bias, for one), on the CPU."""
    kept = model.state_dict()
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name in kept}
