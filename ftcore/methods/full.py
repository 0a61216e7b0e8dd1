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


@METHODS.register("full")
class Full(Method):
    """Full fine-tuning."""

    keeps_base: ClassVar[bool] = False

    kind: str = "full"

    def apply(self, model: nn.Module) -> nn.Module:
        import torch

        for parameter in model.parameters():
            parameter.requires_grad_(True)
            if parameter.dtype in (torch.bfloat16, torch.float16):  # updates below bf16's 3 digits would be lost: fp32 masters
                parameter.data = parameter.data.float()
        return model

    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        raise ModelError("a fully fine-tuned model cannot be switched off to give the base", remedy="use a PEFT method such as `lora`")

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        model.save_pretrained(folder, state_dict=dict(weights))
        config = folder / "config.json"  # transformers writes the dtype the model trains in, not that of the weights it was handed
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtypes[0]}, indent=2))

    def load(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            if shard.name.startswith("model"):
                tensors |= load_file(shard)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name not in tied]
        if missing or unexpected:
            raise IntegrityError(
                "the saved weights do not bind to this model", where=folder, got=f"{len(missing)} missing, {len(unexpected)} unexpected",
                wanted="every tensor, exactly", remedy="it was made from another base; start a new run under another name",
            )  # fmt: skip
