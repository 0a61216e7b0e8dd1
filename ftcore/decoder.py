"""Decoder: one forward pass of a base with many adapters over a slot cache. What the torch engine's thread runs, step by step.

In: rows and chunks. Out: logits of the rows that are due a token. Runs in: the engine's thread, one call at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftcore.errors import FtcoreError, ModelError
from ftcore.layers import slot_cache
from ftcore.layers.flat_decoder import flat_decoder
from ftcore.layers.multi_lora import MultiLora
from ftcore.layers.packed import packed
from ftcore.layers.slot_cache import SlotCache
from ftcore.models import DTYPES, decoder_of, load_base, require_full_precision
from ftcore.recipe import Model
from ftcore.shapes import HEAD_EXTRAS

if TYPE_CHECKING:
    from ftcore.batching import Step
    from ftcore.engines.torch import Torch


def cores() -> int:
    """Processor cores this process may use: its affinity, and the cgroup's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[:2]
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


class Decoder:
    """A base in memory, its adaptable layers, its cache."""

    def __init__(self, section: Torch, base: str) -> None:
        device = section.place()
        dtype = section.dtype if section.dtype != "auto" else "fp32" if device == "cpu" else "bf16"
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        files, held = Model(path=base, dtype=dtype), section.held_as
        self.model = load_base(files, held, device=device).eval().requires_grad_(False)
        if held is None:
            require_full_precision(files)
        self.precision = dtype if held is None else held.serve(self.model, dtype)
        config = self.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.max_context = min(section.max_context, int(getattr(config, "max_position_embeddings", section.max_context)))
        self._require_plain(config)
        want = self._own_logits()
        self.head = self._head()
        self.decoder = decoder_of(self.model)
        self.lora = MultiLora(self.model, section.max_batch + 1, section.max_lanes, self.dtype)
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.cache = SlotCache(config.num_hidden_layers, section.max_batch, self.max_context, heads, size, self.dtype, device)
        self.model.set_attn_implementation(slot_cache.register())
        prefix = next((f"{name}." for name, module in self.model.named_modules() if module is self.decoder and name), "")
        self.flat = flat_decoder(self.decoder, prefix, self.lora, self.max_context)
        self._require_same(want)

    @torch.inference_mode()
    def step(self, step: Step) -> tuple[Tensor, list[bool]]:
        """[n, H] the last hidden states of `step.due`; whether all of each chunk's are finite. Keys and values are written."""
        decoding = [row.request.adapter for row in step.decoding]
        self.lora.set_rows(decoding, [(chunk.row.request.adapter, chunk.count) for chunk in step.chunks])
        ids = [row.tokens[-1] for row in step.decoding]
        for chunk in step.chunks:
            ids += chunk.row.tokens[chunk.row.num_cached : chunk.row.num_cached + chunk.count]
        plan = self.cache.plan(
            [row.num_cached + 1 for row in step.decoding],
            [(chunk.row.place, chunk.row.num_cached, chunk.count) for chunk in step.chunks],
        )
        due, at = list(range(len(step.decoding))), len(step.decoding)
        for chunk in step.chunks:
            at += chunk.count
            if chunk.is_last:
                due.append(at - 1)
        hidden = self._hidden(torch.tensor(ids, device=self.device), plan)
        counts = [len(step.decoding), *(chunk.count for chunk in step.chunks)]
        finite = [bool(part.all()) for part in torch.isfinite(hidden.sum(-1)).cpu().split(counts)[1:]] if step.chunks else []
        return (hidden if len(due) == len(ids) else hidden[torch.tensor(due, dtype=torch.int64, device=self.device)]), finite

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]"""
        return self.head(hidden)

    def _hidden(self, ids: Tensor, plan: slot_cache.StepPlan) -> Tensor:
        """ids [T] -> [T, H]."""
        if self.flat is not None:
            return self.flat(ids, plan, self.cache)
        out = self.decoder(input_ids=ids[None], position_ids=plan.positions[None], use_cache=False, slot_cache=self.cache, slot_step=plan)
        return out.last_hidden_state[0]

    def _head(self) -> Callable[[Tensor], Tensor]:
        """Hidden states [n, H] -> logits [n, V]."""
        head = self.model.get_output_embeddings()
        fast = packed(head.weight.data, None if head.bias is None else head.bias.data) if type(head) is nn.Linear else None
        if fast is None:
            return head
        if head.weight is not self.model.get_input_embeddings().weight:
            head.weight.data = head.weight.new_empty(0, head.in_features)
        return fast

    _PROOF = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)

    @torch.inference_mode()
    def _own_logits(self) -> Tensor:
        """What the base itself says after a short prompt, by its own attention."""
        ids = torch.tensor([[token % self.vocabulary for token in self._PROOF]], device=self.device)
        return self.model(input_ids=ids, use_cache=False).logits[0, -3:].float().cpu()

    @torch.inference_mode()
    def _require_same(self, want: Tensor) -> None:
        """Holds the engine's path (a chunk, another, one token) to the base's own logits. Raises ModelError where they differ."""
        ids = [token % self.vocabulary for token in self._PROOF]
        got, at, counts = [], 0, (4, 5, 1, 1)
        self.lora.rows.proving = True
        try:
            for count in counts:
                decoding = count == 1
                plan = self.cache.plan([at + 1] if decoding else [], [] if decoding else [(0, at, count)])
                self.lora.set_rows([""] if decoding else [], [] if decoding else [("", count)])
                part = torch.tensor(ids[at : at + count], device=self.device)
                got.append(self.head(self._hidden(part, plan)[-1:]))
                at += count
        except FtcoreError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:200]
            raise ModelError("this base does not let the engine reach its attention", got=what, remedy=slot_cache.NO_ENGINE) from error
        finally:
            self.lora.rows.proving = False
        self.lora.prove_rows(counts)
        apart = float((torch.cat(got[1:]).float().cpu() - want).abs().max())
        limit = (1e-4 if self.dtype == torch.float32 else 0.05) * max(1.0, float(want.abs().max()))
        if apart > limit:
            raise ModelError(
                "this base gives other logits in the engine than by itself", got=f"{apart:.3g} apart", wanted=f"at most {limit:.3g}",
                remedy=slot_cache.NO_ENGINE,
            )  # fmt: skip

    def _require_plain(self, config: Any) -> None:
        """Refuses what a step cannot do row by row; keeps positions below where rotary factors begin to depend on the longest row."""
        for name in HEAD_EXTRAS:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ModelError(f"this base's head uses `{name}`, which the torch engine does not have", remedy=slot_cache.NO_ENGINE)
        if getattr(config, "attention_chunk_size", None):
            raise ModelError("this base's attention is cut into chunks, which the torch engine does not have", remedy=slot_cache.NO_ENGINE)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            self.max_context = min(self.max_context, int(original or self.max_context))
