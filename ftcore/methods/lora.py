"""lora: low-rank updates h = Wx + (alpha / r) B A x, with A Gaussian and B zero (Hu et al. 2021, arXiv:2106.09685, eq. 3).

In: a transformers model. Out: a PEFT model and a plain PEFT folder. Runs in: train workers.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftcore.data.families import family_of
from ftcore.errors import IntegrityError, ModelError
from ftcore.methods.base import METHODS, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@METHODS.register("lora")
class Lora(Method):
    """Low-rank adapters on linear layers."""

    servable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    is_adapter: ClassVar[bool] = True

    kind: str = "lora"
    rank: int = Field(8, ge=1)
    """Rank r of the update; 8 to 64."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`); 1 to 4 times the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A; 0.05 to 0.1 on small data."""
    targets: str | tuple[str, ...] = "auto"
    """`auto` (the family's), `all-linear`, a list of layer names, or one regular expression over full module names."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024)."""
    modules_to_save: tuple[str, ...] = ()
    """Whole modules trained and saved beside the adapter (`embed_tokens`, `lm_head`)."""

    def apply(self, model: nn.Module) -> nn.Module:
        from ftcore.lean_imports import LoraConfig, get_peft_model

        whole = any(name.endswith(("embed_tokens", "lm_head")) for name in self.modules_to_save)
        tied = whole and model.config.tie_word_embeddings  # a head trained apart from its embedding cannot be merged
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self._targets(model), use_rslora=self.rslora,
            use_dora=self.dora, modules_to_save=list(self.modules_to_save) or None, task_type="CAUSAL_LM",
            base_model_name_or_path=model.config._name_or_path,
            ensure_weight_tying=tied,
        )  # fmt: skip
        applied = get_peft_model(model, config)
        for module in applied.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # autocast brings A and B to the input's dtype; PEFT would widen the input instead
        return applied

    def _targets(self, model: nn.Module) -> str | list[str]:
        """The layers to adapt, as PEFT takes them. Raises ModelError naming what there is when nothing matches."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        linear -= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        for name in self.modules_to_save:
            if not any(names_module(name, module) for module, _ in model.named_modules()):
                raise ModelError(
                    "modules_to_save matches nothing in this model", where="method.modules_to_save", got=name, wanted=_endings(model)
                )
        wanted: str | list[str] = self.targets if isinstance(self.targets, str) else list(self.targets)
        if wanted == "auto":
            family = family_of(model.config.model_type).targets  # names of all its versions: those this model has
            wanted = [target for target in family if any(matches(name, [target]) for name in linear)] or "all-linear"
        if wanted == "all-linear":
            return "all-linear"
        unmatched = [wanted] if isinstance(wanted, str) else [t for t in wanted if not any(matches(name, [t]) for name in linear)]
        if isinstance(wanted, str):
            unmatched = [] if any(matches(name, wanted) for name in linear) else [wanted]
        if unmatched:
            raise ModelError(
                "a LoRA target matches no linear layer of this model", where="method.targets", got=", ".join(unmatched),
                wanted=", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})), remedy="use some of these names, or `auto`",
            )  # fmt: skip
        return wanted

    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        return model.disable_adapter()

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        from ftcore.lean_imports import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        aliases = ((alias, names[id(parameter)]) for alias, parameter in model.named_parameters(remove_duplicate=False))
        whole = {alias: weights[name] for alias, name in aliases if name in weights}  # a tied head goes by two names
        tensors = get_peft_model_state_dict(model, state_dict=whole)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = model.peft_config["default"]
        was, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = was

    def load(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import load_file

        from ftcore.lean_imports import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = load_file(folder / ADAPTER_WEIGHTS)
        wanted = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
        got = {name: tuple(t.shape) for name, t in tensors.items()}
        if wanted != got:
            odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            raise IntegrityError(
                "the saved adapter does not bind to this model", where=folder, got=f"{len(odd)} tensors differ, first {odd[0]}",
                wanted="every tensor, with its shape",
                remedy="same rank, targets and base as it was made with; else start a new run under another name",
            )  # fmt: skip
        set_peft_model_state_dict(model, tensors)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload(safe_merge=True)


def names_module(name: str, module: str) -> bool:
    """Whether `modules_to_save`'s `name` means `module`: the whole name or its ending."""
    return module == name or module.endswith("." + name)


def matches(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a string is a regular expression over the whole name, a list holds names or endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(names_module(target, name) for target in targets)


def _endings(model: nn.Module) -> str:
    from torch import nn

    return ", ".join(
        sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)})
    )
