"""Optim: learning rate, schedule, batch, optimizer. The Section here; `build` makes the torch optimizer inside functions.

In: the recipe's `optim`. Out: a torch optimizer with weight-decay groups, a learning rate for every step. Runs in: train workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcore.errors import ModelError
from ftcore.section import Section

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optim(Section):
    """The optimizer, its schedule, and how long to train."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW's state: fp32; in 8 bits (a quarter of the memory, tensors of 4096 numbers or more); paged to the host when a GPU is full."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate. LoRA: 1e-4 to 3e-4; full fine-tuning: 1e-5 to 2e-5."""
    batch_size: int = Field(8, ge=1)
    """Blocks per optimizer step over all workers together (with `data.pack: false`, a block is one example)."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training blocks; ignored when `max_steps` is set."""
    max_steps: int | None = Field(None, ge=1)
    """Train this many optimizer steps, whatever `epochs` says: fewer than an epoch, or several."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup: float = Field(0.03, ge=0)
    """Below 1: share of all steps; 1 or more: that many steps. The rate climbs linearly from near zero."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the decay ends, as a share of `lr`."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay; biases and norms are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator floor."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradient norm limit over all trainable parameters; 0 leaves gradients alone."""
    seed: int = Field(0, ge=0)
    """Order of blocks, initial adapter weights, dropout."""

    def warmup_steps(self, num_steps: int) -> int:
        return min(num_steps, int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * num_steps))

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up to `lr`, then the schedule down to `min_lr_ratio * lr` at the last step."""
        warmup = self.warmup_steps(num_steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        progress = (step - warmup) / max(1, num_steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)

    def build(self, model: nn.Module, ndim: Callable[[nn.Parameter], int] = lambda parameter: parameter.ndim) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters, in `named_parameters` order; vectors (biases, norms) get no weight decay.

        `ndim`: a parameter's true number of dimensions, where a shard of it shows another. Raises ModelError for a paged kind where there
        is no GPU to page from.
        """
        import torch

        trainable = [p for _, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if ndim(p) >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if ndim(p) < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        from ftcore.lean_imports import bnb

        if self.kind.startswith("paged") and any(p.device.type == "cpu" for p in trainable):
            raise ModelError(
                "a paged optimizer moves its state between a GPU and the host; on a CPU there is nothing to page", where="optim.kind",
                got=self.kind, wanted="adamw | adamw_8bit", remedy=f"optim.kind={self.kind.removeprefix('paged_')}",
            )  # fmt: skip
        paged, bits = self.kind.startswith("paged"), 8 if self.kind.endswith("8bit") else 32
        return bnb.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, optim_bits=bits, is_paged=paged)
