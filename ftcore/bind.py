"""Bind: a plain PEFT folder onto a fresh base, with proof that every tensor of the file landed and none was left at its start value.

In: a loaded base, an adapter folder. Out: a PeftModel. Runs in: publish, merge, evaluation, `ftcore adapters verify`.

PEFT itself only warns about missing keys and says nothing about unexpected ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ftcore.adapter_files import WEIGHTS, check_adapter
from ftcore.errors import IntegrityError, ModelError
from ftcore.lean_imports import PeftModel, get_peft_model_state_dict


def bind_adapter(base: nn.Module, folder: str | Path) -> PeftModel:
    """Loads through `PeftModel.from_pretrained` and reads every tensor back from the model.

    Raises IntegrityError naming the first tensor that is missing, unexpected, altered, not finite, or a LoRA B left at zero; ModelError
    when the adapter does not fit this base at all.
    """
    folder = Path(folder)
    check_adapter(folder)
    tensors = load_tensors(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, with its name
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings")  # merging takes them apart; the probes hold either way
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except Exception as error:  # PEFT raises of every kind for a configuration that makes no sense
            raise ModelError(
                "this adapter does not fit this base", where=folder, got=str(error).strip().split("\n")[-1][:300],
                remedy="use the base that its card names",
            ) from error  # fmt: skip
    require_bound(model, tensors, folder)
    return model


def widen_whole_modules(model: PeftModel, folder: Path) -> None:
    """Gives `modules_to_save` the file's own dtype: PEFT holds them in the base's, which rounds what was trained in fp32."""
    tensors = load_tensors(folder)
    for name, parameter in model.named_parameters():
        saved = tensors.get(name.replace(".modules_to_save.default", ""))
        if ".modules_to_save." in name and saved is not None:
            parameter.data = saved.to(parameter.device)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a checked folder. Raises IntegrityError when they cannot be read, are not finite, or were never trained."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise IntegrityError(
            "these weights cannot be read", where=folder / WEIGHTS, got=str(error)[:200], remedy="save the adapter again"
        ) from error
    require_trained(tensors, folder)
    return tensors


def require_bound(model: PeftModel, tensors: dict[str, Tensor], where: object) -> None:
    """Every tensor of the file is in the model with its value (in the model's dtype), and the model's adapter holds no other."""
    bound = get_peft_model_state_dict(model, save_embedding_layers=False)
    if missing := sorted(set(bound) - set(tensors)):
        raise _unbound("this adapter lacks tensors that its configuration promises", missing, where)
    extra = sorted(set(tensors) - set(bound))
    whole = dict(model.state_dict()) if extra else {}  # embeddings saved whole, after tokens were added
    if strangers := [name for name in extra if name not in whole]:
        raise _unbound("this adapter holds tensors that bind to nothing in this base", strangers, where)
    bound |= {name: whole[name] for name in extra}
    altered = [name for name, tensor in tensors.items() if not _same(tensor, bound[name])]
    if altered:
        raise _unbound("tensors of this adapter did not reach the model", altered, where)


def require_trained(tensors: dict[str, Tensor], where: object) -> None:
    """Refuses tensors that are not finite, and LoRA B matrices still at zero (an expert that no token reached may be)."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise IntegrityError("a tensor of this adapter is not finite", where=where, got=name, remedy="train with a lower learning rate")
    zero = [name for name, tensor in tensors.items() if ("lora_B" in name or "lora_embedding_B" in name) and not bool(tensor.any())]
    num_b = sum("lora_B" in name or "lora_embedding_B" in name for name in tensors)
    odd = zero if len(zero) == num_b else [name for name in zero if "expert" not in name]
    if odd:
        raise IntegrityError(
            "a LoRA B matrix of this adapter is still zero: that layer does nothing", where=where,
            got=f"{len(odd)} of {num_b}, first {odd[0]}",
            wanted="every B moved by training", remedy="it was saved before training or gathered wrongly; save it again",
        )  # fmt: skip


def _same(saved: Tensor, held: Tensor) -> bool:
    return saved.shape == held.shape and torch.equal(saved.to(held.dtype), held.detach().cpu())


def _unbound(what: str, names: list[str], where: object) -> IntegrityError:
    remedy = "use the base that its card names, and the adapter as it was saved"
    return IntegrityError(
        what, where=where, got=f"{len(names)}, first {names[0][:200]}", wanted="every tensor bound exactly", remedy=remedy
    )
