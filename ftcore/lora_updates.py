"""LoRA updates: an adapter folder as the matrices that a batched layer adds, every one of them bound to a layer of this base.

In: a plain PEFT folder, the layers of a base. Out: layer name -> LayerUpdate, scaled. Runs in: engines, off their step.

What the batched layers do not have is refused with its name: other methods than LoRA, DoRA, biases, embeddings, whole modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ftcore.adapter_files import WEIGHTS, check_adapter, read_config
from ftcore.bind import require_trained
from ftcore.errors import IntegrityError, ModelError
from ftcore.layers.multi_lora import LayerUpdate

KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

UNSERVED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA", "layer_replication": "layer replication",
}  # fmt: skip
"""Keys of a LoRA configuration that mean more than A and B."""


def read_updates(folder: Path, layers: Mapping[str, tuple[int, int]], max_rank: int, dtype: torch.dtype) -> dict[str, LayerUpdate]:
    """`layers`: (in, out) features of each adaptable layer by name. Scale and dtype are applied here, once.

    Raises IntegrityError for a damaged folder, ModelError for an adapter that this base or this engine cannot serve.
    """
    config = read_config(folder)
    _require_servable(config, folder)
    check_adapter(folder)
    tensors = load_file(folder / WEIGHTS)
    require_trained(tensors, folder)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise _refused(f"it holds `{key}`", folder, "LoRA matrices of linear layers alone")
        if match["layer"] not in layers:
            raise _refused(f"it adapts `{match['layer']}`, which is no linear layer of this base", folder, "an adapter of this base")
        sides.setdefault(match["layer"], {})[match["side"]] = tensor
    updates = {}
    for name, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise IntegrityError("half of a LoRA pair is missing", where=folder, got=name, remedy="save the adapter again")
        a, b = pair["A"], pair["B"]
        wanted = (*layers[name], a.shape[0])
        if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0], b.shape[1]) != wanted:
            shapes = f"{name}: A {list(a.shape)}, B {list(b.shape)}"
            raise _refused(f"its shapes do not fit ({shapes})", folder, f"A [r, {wanted[0]}], B [{wanted[1]}, r]")
        if a.shape[0] > max_rank:
            raise _refused(f"its rank is {a.shape[0]}", folder, f"a rank of at most {max_rank} (engine.max_rank)")
        scaled = b.float().T * scale_of(config, name, a.shape[0])
        update = LayerUpdate(a.to(dtype).contiguous(), scaled.to(dtype).contiguous())
        if not bool(torch.isfinite(update.a).all() and torch.isfinite(update.b).all()):
            raise _refused(f"`{name}` is not finite in the engine's precision", folder, "finite weights", "serve it with engine.dtype=fp32")
        updates[name] = update
    return updates


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha from `alpha_pattern` where a pattern names the layer, as PEFT looks it up."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _require_servable(config: Mapping[str, Any], folder: Path) -> None:
    if config["peft_type"] != "LORA":
        raise _refused(f"its method is {config['peft_type']}", folder, "LoRA", "merge it into a model of its own, and serve that as a base")
    if config.get("modules_to_save"):
        got = f"it saves whole modules: {', '.join(map(str, config['modules_to_save']))}"
        raise _refused(got, folder, "LoRA matrices alone", "merge it into a model of its own, or train without modules_to_save")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise _refused("it moves biases", folder, "LoRA matrices alone", "train with bias: none")
    for key, name in UNSERVED.items():
        if config.get(key):
            raise _refused(f"it uses {name} ({key})", folder, "plain LoRA or rsLoRA", "merge it into a model of its own")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        got, remedy = f"it changes the base's own weights (init_lora_weights: {start})", "have PEFT convert it to plain LoRA as it saves"
        raise _refused(got, folder, "an adapter that leaves the base as it is", remedy)
    if config.get("trainable_token_indices") or config.get("target_parameters"):
        raise _refused("it trains tokens or bare parameters", folder, "LoRA on linear layers", "merge it into a model of its own")


def _refused(got: str, folder: Path, wanted: str, remedy: str = "publish an adapter trained on this base") -> ModelError:
    return ModelError("this adapter cannot be served by this engine", where=folder, got=got, wanted=wanted, remedy=remedy)
