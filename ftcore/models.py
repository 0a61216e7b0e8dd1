"""Models: a base loaded from a folder or the hub, and the view of it that stages compute losses with.

In: the recipe's `model`. Out: a transformers model; a CausalModel over it. Runs in: train workers, publish, evaluation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ftcore.data.collate import IGNORED, Batch
from ftcore.errors import ModelError
from ftcore.layers import varlen
from ftcore.losses import linear_cross_entropy, token_logps
from ftcore.mirror import at_hand
from ftcore.shapes import HEAD_EXTRAS
from ftcore.weights import check_base

if TYPE_CHECKING:
    from ftcore.methods.base import Method
    from ftcore.quantisation import Quantisation
    from ftcore.recipe import Model

log = logging.getLogger(__name__)
disable_progress_bar()  # a bar for each shard from each worker says nothing and breaks the progress line
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # peft asks by the old name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Layout = Literal["varlen", "padded"]


def autocast_dtype(dtype: str) -> torch.dtype | None:
    """The dtype matmuls run in over fp32 trainables; None where no casting is needed."""
    return DTYPES[dtype] if dtype in ("bf16", "fp16") else None


def load_base(model: Model, method: Method | Quantisation | None = None, *, device: str = "cpu", dtype: str | None = None) -> nn.Module:
    """Loads the base with safetensors only, held as `method` wants it; `dtype` overrules the recipe's.

    Raises ModelError for what is missing or damaged.
    """
    model = at_hand(model)
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype or model.dtype],
        "use_safetensors": True,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": {"auto": None, "varlen": None}.get(model.attention, model.attention),
    }
    folder = Path(model.path)
    if folder.is_dir():
        check_base(folder)
    elif model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        raise ModelError(
            "there is no such model folder", where=model.path, wanted="a folder with config.json and *.safetensors, or a hub name"
        )
    else:
        options["revision"] = model.revision
    if method is not None:
        options |= method.load_options()
        if method.quantises:
            require_full_precision(model)
            options["device_map"] = {"": device}  # quantised where it will stay
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(model.path, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError("the base model cannot be loaded", where=model.path, got=_first_line(error), remedy=_load_remedy(model)) from error
    lost = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lost:
        raise ModelError(
            "the base model's files lack weights, which would be made up at random",
            where=model.path,
            got=f"{len(lost)} tensors, first {lost[0]}",
            wanted="every tensor of its config.json",
            remedy="copy or download the folder again, or take the causal language model, not a part of it",
        )
    loaded.config.use_cache = False
    if method is not None:
        method.loaded(loaded, dtype or model.dtype)
    return loaded.to(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def _load_remedy(model: Model) -> str:
    if Path(model.path).is_dir():
        return "check that the folder holds a causal language model that this transformers version knows"
    return "check the name and revision, and that the hub is reachable (HF_ENDPOINT, HF_TOKEN), or give a local folder"


def model_type(model: Model) -> str:
    """`model_type` of the base's config.json ("qwen2", "llama", ...), without loading weights."""
    model = at_hand(model, weights=False)
    return str(_config(model).model_type)


def require_full_precision(model: Model) -> None:
    """Raises ModelError where the base's files are quantised: it would be held as they say, whatever a method or an engine says."""
    if found := getattr(_config(at_hand(model, weights=False)), "quantization_config", None):
        raise ModelError(
            "this base's files are quantised already", where=model.path, got=str(found.get("quant_method", "of an unknown kind")),
            wanted="files in full precision", remedy="take the base it was made of, and have it quantised as it is loaded (nf4, fp4, int8)",
        )  # fmt: skip


def _config(model: Model) -> Any:
    try:
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the base model's config.json cannot be read", where=model.path, got=_first_line(error), remedy=_load_remedy(model)
        ) from error


def choose_layout(model: nn.Module, attention: str, *, packs: bool) -> Layout:
    """Decides how segments are fed: end to end where the attention provably keeps them apart, else padded rows.

    The proof is behavioural: two segments through the real model, alone and together. Raises ModelError when blocks are packed and the
    model cannot keep them apart.
    """
    if attention in ("sdpa", "eager"):
        reason = f"model.attention is `{attention}`"
    elif getattr(model.config.get_text_config(), "attention_chunk_size", None):
        reason = "its attention is cut into chunks by a mask that segments laid end to end do not have"
    else:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(varlen.register())
            leak = isolation_error(model)
            if leak <= 1e-3:
                return "varlen"
            reason = f"segments influence each other by {leak:.2g} of the hidden states' size"
        except (ModelError, ValueError, TypeError, RuntimeError) as error:
            reason = _first_line(error)
        model.set_attn_implementation(before)
    if packs or attention == "varlen":
        raise ModelError(
            "this model's attention cannot keep packed segments apart",
            where=type(model).__name__,
            got=reason,
            wanted="an attention path that isolates segments",
            remedy="set data.pack: false (examples are then padded, grouped by length)",
        )
    log.info("feeding padded rows: %s", reason)
    return "padded"


@torch.no_grad()
def isolation_error(model: nn.Module) -> float:
    """Largest change of a segment's hidden states when it is laid behind another one, relative to their size; 0 is perfect."""
    decoder = decoder_of(model)
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (torch.arange(1, n + 1, device=device) * 37 % vocabulary for n in (5, 9))
    was_training = model.training
    model.eval()

    def run(*segments: Tensor) -> Tensor:
        lengths = [len(s) for s in segments]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        out = decoder(input_ids=torch.cat(segments)[None], position_ids=positions[None], segment_lengths=lengths, use_cache=False)
        return out.last_hidden_state[0, -9:].float()

    alone, behind = run(second), run(first, second)
    model.train(was_training)
    return float((alone - behind).abs().max() / alone.abs().max())


def decoder_of(model: nn.Module) -> nn.Module:
    """The part below the head."""
    decoder = model.get_decoder()
    return model.base_model if decoder is model else decoder


class CausalModel:
    """A causal language model as stages see it: losses and log-probabilities at the trained positions of a Batch."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        """`model`: the trained module (a PEFT wrapper or a transformers model)."""
        self.model, self.layout = model, layout
        self.lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = decoder_of(self.lm)
        self.head = self.lm.get_output_embeddings()
        self.vocabulary = int(self.lm.config.get_text_config().vocab_size)
        self.head_exact = self._head_is_exact()
        if not self.head_exact:
            log.info("the head of %s is more than its output layer: the whole logits are made", type(self.lm).__name__)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
        if self.layout == "varlen":
            return inputs | {"segment_lengths": batch.segment_lengths}
        return inputs | {"attention_mask": batch.attention_mask}

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states at the trained positions, [N, D]."""
        states = self.decoder(**self._inputs(batch)).last_hidden_state
        return states[batch.targets != IGNORED]

    def logits(self, batch: Batch) -> Tensor:
        """All logits [B, T, V]; for checks and small evaluations, not for training."""
        return self.lm(**self._inputs(batch)).logits

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Summed over the trained targets."""
        targets = batch.targets[batch.targets != IGNORED]
        if self._is_linear():
            return called_as(self.head, lambda hidden: linear_cross_entropy(hidden, self.head.weight, targets), self.hidden(batch))
        return -self.logps(batch).sum()

    def logps(self, batch: Batch) -> Tensor:
        """log p of each trained target, [N]; `batch.target_segments` says whose it is."""
        keep = batch.targets != IGNORED
        targets = batch.targets[keep]
        if self.head_exact:
            return token_logps(self.hidden(batch), self.head, targets, self.vocabulary)
        return token_logps(self.logits(batch)[keep], nn.Identity(), targets, self.vocabulary)

    def _is_linear(self) -> bool:
        return self.head_exact and type(self.head) is nn.Linear and self.head.bias is None

    @torch.no_grad()
    def _head_is_exact(self) -> bool:
        """Whether head(hidden) gives the model's own logits (no soft-capping, no logit scale); asked of the model itself."""
        config = self.lm.config.get_text_config()
        if any(getattr(config, name, None) not in (None, 1, 1.0) for name in HEAD_EXTRAS):
            return False  # at a fresh model's small logits a soft cap cannot be seen
        device = next(self.lm.parameters()).device
        ids = (torch.arange(1, 7, device=device) * 31 % self.vocabulary)[None]
        inputs = {"input_ids": ids, "position_ids": torch.arange(6, device=device)[None], "use_cache": False}
        inputs |= {"segment_lengths": (6,)} if self.layout == "varlen" else {"attention_mask": torch.ones_like(ids)}
        was_training = self.lm.training
        half = next((p.dtype for p in self.lm.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
        self.lm.eval()
        with autocasting(device.type, half):
            ours = self.head(self.decoder(**inputs).last_hidden_state).float()
            theirs = self.lm(**inputs).logits.float()
        self.lm.train(was_training)
        return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4))


def called_as(module: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Calls `module` with `forward` in place of its own: what hangs on its calls (hooks that gather sharded weights) takes part."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        return module(inputs)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class ReferenceModel(CausalModel):
    """The untouched base behind a policy: the same weights with the method switched off, and no gradients."""

    def __init__(self, policy: CausalModel, method: Method, model: nn.Module) -> None:
        self.__dict__.update(policy.__dict__)
        self._without: Callable[[], AbstractContextManager[None]] = lambda: method.without(model)

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        with self._without():
            return super().logps(batch)

    @torch.no_grad()
    def cross_entropy(self, batch: Batch) -> Tensor:
        with self._without():
            return super().cross_entropy(batch)


def keep_masters(model: nn.Module) -> None:
    """Widens trainable parameters in half precision to fp32: updates below bf16's 3 digits would be lost."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def autocasting(device: str, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return nullcontext() if dtype is None else torch.autocast(device.split(":")[0], dtype=dtype)
