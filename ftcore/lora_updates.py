"""LoRA updates: an adapter folder as the matrices that a batched layer adds, every one of them bound to a layer of this base.

In: a plain PEFT folder, the layers of a base. Out: layer name -> LayerUpdate, scaled. Runs in: engines, off their step.

What the batched layers do not have is refused with its name: other methods than LoRA, DoRA, biases, embeddings, whole modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftcore.adapter_files import check_adapter, read_config
from ftcore.bind import load_tensors
from ftcore.errors import IntegrityError, ModelError
from ftcore.layers.multi_lora import LayerUpdate
from ftcore.safetensors_header import TensorFact

KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

UNSERVED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA", "layer_replication": "layer replication",
}  # fmt: skip
"""Keys of a LoRA configuration that mean more than A and B."""
PATTERN_OF = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
NAMES = re.compile(r"([\w.^$|-]|\\[.d])+")
"""Patterns that are matched in the time that reading them takes: a search that explodes would hold up every tenant."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in this process's memory."""

    updates: dict[str, LayerUpdate]
    rank: int
    """Its largest."""
    num_bytes: int
    fingerprint: int
    """Of the weights as they were read and checked; what slots hold is compared with it."""


def read_updates(folder: Path, layers: Mapping[str, tuple[int, int]], max_rank: int, dtype: torch.dtype) -> dict[str, LayerUpdate]:
    """`layers`: (in, out) features of each adaptable layer by name. Scale and dtype are applied here, once.

    Raises IntegrityError for a damaged folder, ModelError for an adapter that this base or this engine cannot serve.
    """
    config = read_config(folder)
    _require_servable(config, folder)
    names = _bound(check_adapter(folder), config, layers, max_rank, folder)
    tensors = load_tensors(folder)
    updates = {}
    for layer, (a, b) in names.items():
        rank = tensors[a].shape[0]
        scaled = tensors[b].float().T * scale_of(config, layer, rank)
        update = LayerUpdate(tensors[a].to(dtype).contiguous(), scaled.to(dtype).contiguous())
        if not bool(torch.isfinite(update.a).all() and torch.isfinite(update.b).all()):
            raise _refused(
                f"`{layer}` is not finite in the engine's precision", folder, "finite weights", "serve it with engine.dtype=fp32"
            )
        updates[layer] = update
    return updates


def _bound(
    facts: Mapping[str, TensorFact], config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]], max_rank: int, folder: Path
) -> dict[str, tuple[str, str]]:
    """Layer -> names of its A and B, every tensor of the file in one pair. By shapes alone: nothing is read that does not fit."""
    sides: dict[str, dict[str, str]] = {}
    for key in facts:
        match = KEY.fullmatch(key)
        if match is None:
            raise _refused(f"it holds `{key}`", folder, "LoRA matrices of linear layers alone")
        if match["layer"] not in layers:
            raise _refused(f"it adapts `{match['layer']}`, which is no linear layer of this base", folder, "an adapter of this base")
        sides.setdefault(match["layer"], {})[match["side"]] = key
    for layer, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise IntegrityError("half of a LoRA pair is missing", where=folder, got=layer, remedy="save the adapter again")
        (width, height), rank = layers[layer], rank_of(config, layer)
        a, b = facts[pair["A"]].shape, facts[pair["B"]].shape
        if a != (rank, width) or b != (height, rank):
            shapes = f"{layer}: A {list(a)}, B {list(b)}"
            raise _refused(f"its shapes do not fit ({shapes})", folder, f"A [{rank}, {width}], B [{height}, {rank}]")
        if rank > max_rank:
            raise _refused(f"its rank is {rank}", folder, f"a rank of at most {max_rank} (engine.max_rank)")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def rank_of(config: Mapping[str, Any], layer: str) -> Any:
    return _by_pattern(config, "rank_pattern", layer, config.get("r", 8))


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    alpha = float(_by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(config: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """The value of the first pattern that names the layer, as PEFT looks it up."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return default


def _require_servable(config: Mapping[str, Any], folder: Path) -> None:
    if config["peft_type"] != "LORA":
        raise _refused(f"its method is {config['peft_type']}", folder, "LoRA", "merge it into a model of its own, and serve that as a base")
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        values = [config[key]] if key in config else []
        pattern = config.get(PATTERN_OF[key]) or {}
        if not isinstance(pattern, dict) or not all(NAMES.fullmatch(name) for name in pattern):
            wanted = "names of modules, without repetitions or groups"
            raise _refused(f"its {PATTERN_OF[key]} is {str(pattern)[:200]}", folder, wanted, "name the modules")
        for value in [*values, *pattern.values()]:
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
                raise _refused(f"its {key} is {str(value)[:80]}", folder, "a number above 0", "save the adapter again")
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
