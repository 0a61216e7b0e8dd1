"""Merge: an adapter folded into its full-precision base, written as a plain transformers model, loaded again and compared.

In: a fetched version, its base. Out: a folder that plain transformers loads, and how far its logits are. Runs in: the driver.

Compared are the adapter on the base and the merged model as it lies on disk, both computed in fp32, over the whole vocabulary at the
probes' positions. Saved in fp32 they must agree to 1e-4 (or a tenth of a faint adapter's effect); saved in bf16 or fp16 the merged weights
are rounded, and must agree to 10 % of the adapter's own effect.
"""

from __future__ import annotations

import gc
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ftcore.adapter_files import WEIGHTS, read_config
from ftcore.adapters import AdapterRef
from ftcore.bind import bind_adapter
from ftcore.card import Card
from ftcore.data.tokenizer import load_tokenizer
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.export.modelcard import render_merged
from ftcore.models import DTYPES, load_base
from ftcore.probes import ABSOLUTE, SHARE, Probes, check, last_logits
from ftcore.recipe import Model
from ftcore.weights import base_folder, check_base, weights_digest

Log = Callable[[str], None]
SHARD_BYTES = "4GB"
Dtype = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Merged:
    """Where the merged model is and how far it is from the adapter on the base."""

    folder: Path
    dtype: str
    difference: float
    """Largest absolute difference of a logit."""
    effect: float
    """Largest difference the adapter makes to the bare base."""
    limit: float


def merge_adapter(
    ref: AdapterRef, folder: Path, out: Path, *, base: str | None = None, dtype: Dtype = "auto", tolerance: float | None = None,
    log: Log = print,
) -> Merged:  # fmt: skip
    """Merges the fetched version in `folder` into its base and writes `out`, which must not exist or be empty.

    Raises ModelError when the base is another one, IntegrityError (and leaves nothing in `out`) when the merged model differs too much.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the place for the merged model is taken", where=out, wanted="an empty or new folder", remedy="choose another --out"
        )
    card = Card.read(folder / "card.json")
    model = model_of(card, base)
    require_base(card, model)
    dtype = _stored_dtype(model) if dtype == "auto" else dtype
    probes = Probes.load(folder)
    merged, tuned, bare = _merge_in_memory(model, folder, probes)
    effect = _furthest(tuned, bare)
    limit = tolerance if tolerance is not None else min(ABSOLUTE, SHARE * effect) if dtype == "fp32" else SHARE * effect
    building = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write(merged, building, card, model, dtype)
        del merged
        gc.collect()
        difference = _furthest(tuned, _reloaded_logits(building, probes))
        result = Merged(out, dtype, difference, effect, limit)
        log(f"merged {ref} in {dtype}: logits differ by {difference:.3g} at most (allowed {limit:.3g}, effect {effect:.3g})")
        if not difference <= limit:
            raise IntegrityError(
                "the merged model does not give the adapter's logits", where=out, got=f"{difference:.3g}", wanted=f"at most {limit:.3g}",
                remedy="merge in fp32 (--dtype fp32), or serve the adapter on its base",
            )  # fmt: skip
        (building / "README.md").write_text(render_merged(card, dtype, difference, limit), encoding="utf-8")
        if out.exists():
            out.rmdir()
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return result


def model_of(card: Card, base: str | None) -> Model:
    """The recipe section that loads the card's base (from `base` where it lies elsewhere here)."""
    return Model(path=base or card.base.id, revision=card.base.revision, dtype="fp32", attention="sdpa")


def require_base(card: Card, model: Model) -> None:
    """Raises ModelError unless the weights are the ones the adapter was trained on."""
    folder = base_folder(model.path, model.revision)
    check_base(folder)
    digest = weights_digest(folder)
    if digest != card.base.weights:
        raise ModelError(
            "this is not the base the adapter was trained on", where=folder, got=f"weights {digest[:16]}",
            wanted=f"weights {card.base.weights[:16]}", remedy="give the right one with --base",
        )  # fmt: skip


def _merge_in_memory(model: Model, folder: Path, probes: Probes) -> tuple[nn.Module, Tensor, Tensor]:
    """The merged model in fp32, and the logits of adapter-on-base and bare base at the probes."""
    loaded = load_base(model, dtype="fp32")
    _untie(loaded, load_file(folder / WEIGHTS), bool(read_config(folder).get("ensure_weight_tying")))
    tuned = bind_adapter(loaded, folder)
    check(tuned, load_tokenizer(model), probes, "fp32", tuned.disable_adapter).require(folder)
    with_adapter = last_logits(tuned, probes.prompts)
    with tuned.disable_adapter():
        bare = last_logits(tuned, probes.prompts)
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        remedy = "serve the adapter on its base instead"
        raise ModelError(
            "this kind of adapter cannot be merged", where=folder, got=str(error).split("\n")[0][:200], remedy=remedy
        ) from error
    return merged, with_adapter, bare


def _untie(model: nn.Module, tensors: dict[str, Tensor], keeps_tied: bool) -> None:
    """Where the adapter changes the output layer or embeddings of a model that shares them, gives the output layer its own weights."""
    assert isinstance(model, PreTrainedModel)
    head: nn.Module | None = model.get_output_embeddings()
    embeddings: nn.Module = model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight or keeps_tied:
        return
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head or module is embeddings]
    if any(f".{name}." in key for key in tensors for name in names):
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _write(merged: nn.Module, folder: Path, card: Card, model: Model, dtype: str) -> None:
    assert isinstance(merged, PreTrainedModel)
    merged.config.use_cache = True  # training loads it switched off
    merged.to(DTYPES[dtype])
    merged.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    load_tokenizer(model).save_pretrained(folder)
    (folder / "ftcore_adapter.json").write_text(
        json.dumps({"adapter": f"{card.tenant}/{card.name}@{card.digest}", "base": card.base.id}) + "\n"
    )


def _reloaded_logits(folder: Path, probes: Probes) -> Tensor:
    check_base(folder)
    return last_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True), probes.prompts)


def _stored_dtype(model: Model) -> Dtype:
    """The dtype the base lies on disk in, so that a merge does not change its size; fp32 for anything unusual."""
    sizes: dict[str, int] = {}
    for fact in check_base(base_folder(model.path, model.revision)).values():
        sizes[fact.dtype] = sizes.get(fact.dtype, 0) + fact.num_elements
    most = max(sizes, key=lambda name: sizes[name])
    return "bf16" if most == "BF16" else "fp16" if most == "F16" else "fp32"


def _furthest(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b.double()).abs() if a.shape == b.shape else torch.tensor(float("inf"))
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")
