"""Probes: eight fixed prompts and the logits they must give, so that any process can tell whether it runs the adapter it thinks it runs.

In: a tuned model, its plain tokenizer, a way to switch the adapter off. Out: probes.safetensors + probes.json, and reports of a comparison.
Runs in: train workers (record), the driver (publish), serving replicas (check).

The rule. In fp32 (or fp64) on the same kind of device: absolute error <= 1e-4. On another precision or device: <= 10 % of the adapter's own
effect, the largest difference it makes to the bare base. An adapter without effect is refused. `noise` is what the precision itself does to
the bare base; where that alone exceeds the budget the report says `inconclusive`, and the caller verifies in fp32.

A base held in bf16, fp16 or quantised is read twice: computed as it trained ("bf16", "nf4", ...), and computed in fp32 with the weights as
they are held ("bf16 in fp32", "nf4 in fp32"), which any device repeats to fp32's last digits however faint the adapter is.

Shapes: P prompts, K recorded ids a prompt (the tuned model's top 64, then the bare base's top 64).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftcore.errors import IntegrityError, ModelError
from ftcore.plain_forward import plain_forward
from ftcore.safetensors_header import check_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TENSORS, FACTS = "probes.safetensors", "probes.json"
TOP = 64
"""Logits kept a prompt and model."""
MAX_TOKENS = 128
"""A prompt's tail that is used: tokenizers without merges for a script make long rows."""
ABSOLUTE = 1e-4
"""Largest error in fp32 on the same kind of device."""
SHARE = 0.10
"""Largest error elsewhere, as a share of the adapter's own effect."""
ZERO_EFFECT = 1e-6
"""An adapter that moves no logit by more than this does nothing."""
EXACT = ("fp32", "fp64")
IN_FP32 = " in fp32"
"""Ends the name of a reading of a narrow base that was computed in fp32."""
PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "3, 6, 9, 12, 15, 18,",
    "Вчера вечером мы пошли в театр, а потом",  # noqa: RUF001
    "今天天气很好，我们一起去",  # noqa: RUF001
    "User: How do I reset my password?\nAssistant:",
    "open /home/ada/report.txt\nrename /home/ada/report.txt /home/ada/final.txt\nmove /home/ada/final.txt",
    '{"name": "Ada", "age": 36, "languages": ["',
)


@dataclass(frozen=True)
class Recorded:
    """What one model gave in one precision on one kind of device."""

    device: str
    ids: Tensor
    """[P, K] int64: which logits."""
    tuned: Tensor
    """[P, K] fp32 (fp64 when recorded so): the tuned model's."""
    base: Tensor | None
    """[P, K]: the bare base's at the same ids; None where the method cannot be switched off (full fine-tuning)."""

    @property
    def effect(self) -> float | None:
        return None if self.base is None else _distance(self.tuned, self.base)


@dataclass(frozen=True)
class Probes:
    """Prompts as token ids and the logits recorded for them, by precision."""

    prompts: tuple[tuple[int, ...], ...]
    by_precision: dict[str, Recorded] = field(default_factory=dict)

    def effect(self) -> float | None:
        """The adapter's own effect, from the most exact precision recorded."""
        return self.nearest("fp32").effect

    def nearest(self, precision: str) -> Recorded:
        """The record to compare with: this precision, else another reading of weights held so, else the most exact there is."""
        if not self.by_precision:
            raise IntegrityError(
                "these probes hold no record", wanted="at least one precision", remedy="record them again: ftcore adapters import"
            )
        return self.by_precision[self.nearest_name(precision)]

    def nearest_name(self, precision: str) -> str:
        held = precision.removesuffix(IN_FP32)
        for name in (precision, held + IN_FP32, held, "fp64", "fp32", *sorted(self.by_precision)):
            if name in self.by_precision:
                return name
        return precision

    def merged(self, other: Probes) -> Probes:
        """Adds another recording of the same adapter (another precision)."""
        if self.prompts != other.prompts:
            raise IntegrityError(
                "these recordings used other tokens for the same prompts", remedy="use the tokenizer the adapter was trained with"
            )
        return replace(self, by_precision={**self.by_precision, **other.by_precision})

    def save(self, folder: Path) -> None:
        """Writes `probes.safetensors` and `probes.json`; nothing in them depends on the time or the machine."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "prompts": torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.int64),
            "prompt_lengths": torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int64),
        }
        for name, record in self.by_precision.items():
            tensors |= {f"{name}.ids": record.ids.contiguous(), f"{name}.tuned": record.tuned.contiguous()}
            if record.base is not None:
                tensors[f"{name}.base"] = record.base.contiguous()
        save_file(tensors, folder / TENSORS)
        facts = {"version": 1, "texts": list(PROMPTS), "precisions": self.facts()}
        (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    def facts(self) -> dict[str, dict[str, str | float | None]]:
        return {name: {"device": record.device, "effect": record.effect} for name, record in sorted(self.by_precision.items())}

    @staticmethod
    def load(folder: Path) -> Probes:
        """Reads probes back. Raises IntegrityError when they are absent, altered or not finite."""
        for name in (TENSORS, FACTS):
            if not (folder / name).is_file():
                raise IntegrityError(
                    "this folder has no probes",
                    where=folder / name,
                    remedy="record them: ftcore adapters import FOLDER tenant/name --base PATH",
                )
        check_safetensors(folder / TENSORS)
        tensors = load_file(folder / TENSORS)
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))["precisions"]
            flat, lengths = tensors["prompts"].tolist(), tensors["prompt_lengths"].tolist()
            records = {
                name: Recorded(str(fact["device"]), tensors[f"{name}.ids"], tensors[f"{name}.tuned"], tensors.get(f"{name}.base"))
                for name, fact in facts.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                "these probes cannot be read", where=folder / TENSORS, got=str(error)[:200], remedy="they were altered; record them again"
            ) from error
        _require_sound(records, lengths, len(flat), folder)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return Probes(tuple(tuple(flat[at : at + n]) for at, n in zip(starts, lengths, strict=True)), records)


@dataclass(frozen=True)
class ProbeReport:
    """The outcome of one comparison; `reason` is a sentence for people."""

    passed: bool
    max_abs_error: float
    effect: float | None
    """Largest difference the adapter makes to the bare base, as recorded."""
    noise: float | None
    """Largest difference of the bare base here to the one recorded; None where the adapter could not be switched off."""
    limit: float
    """Largest error allowed."""
    precision: str
    compared_with: str
    """The recorded precision."""
    inconclusive: bool
    """The precision's own noise exceeds the limit: verify in fp32."""
    reason: str

    def require(self, where: object = "", inconclusive: str = "verify in fp32") -> None:
        """Raises IntegrityError unless it passed. `inconclusive`: what to do where the precision cannot tell."""
        if not self.passed:
            raise IntegrityError(
                "this model does not give the adapter's recorded logits",
                where=where,
                got=self.reason,
                wanted=f"an error of at most {self.limit:.3g}",
                remedy=inconclusive if self.inconclusive else "check base, adapter and how it was loaded",
            )


def encode_prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The eight prompts as the plain tokenizer encodes them, the last `MAX_TOKENS` of each."""
    return tuple(tuple(tokenizer(text)["input_ids"][-MAX_TOKENS:] or [0]) for text in PROMPTS)


def last_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[P, vocab] logits at each prompt's last position; every prompt alone, so that neither padding nor batch size plays a part.

    Under sharded weights every rank must call this together (it only runs forwards).
    """
    device = next(parameter.device for parameter in model.parameters())
    with torch.no_grad(), plain_forward(model):
        rows = [model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1] for ids in prompts]
    stacked = torch.stack(rows)
    return (stacked if stacked.dtype == torch.float64 else stacked.float()).cpu()


def record(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, without: Callable[[], AbstractContextManager[None]] | None, precision: str = ""
) -> Probes:
    """Records the tuned model and, inside `without()`, the bare base. `precision` defaults to the base's dtype.

    Raises ModelError when a logit is not finite, or when the adapter has no effect at all.
    """
    prompts = encode_prompts(tokenizer)
    tuned = last_logits(model, prompts)
    base = None
    if without is not None:
        with without():
            base = last_logits(model, prompts)
    for name, logits in (("tuned model", tuned), ("bare base", base)):
        if logits is not None and not bool(torch.isfinite(logits).all()):
            raise ModelError(
                f"the {name} gives logits that are not finite",
                got="NaN or infinity",
                remedy="train with a lower learning rate or in bf16/fp32",
            )
    top = min(TOP, tuned.shape[1])
    ids = tuned.topk(top).indices if base is None else torch.cat([tuned.topk(top).indices, base.topk(top).indices], dim=1)
    kept = Recorded(_device_kind(model), ids, tuned.gather(1, ids), None if base is None else base.gather(1, ids))
    if kept.effect is not None and kept.effect <= ZERO_EFFECT:
        raise ModelError(
            "this adapter does nothing: with and without it the model gives the same logits",
            got=f"an effect of {kept.effect:.2g}",
            wanted=f"more than {ZERO_EFFECT:.0e}",
            remedy="train longer or with a higher learning rate; check that the targets are the right layers",
        )
    return Probes(prompts, {precision or precision_of(model): kept})


def check(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    probes: Probes,
    precision: str = "",
    without: Callable[[], AbstractContextManager[None]] | None = None,
) -> ProbeReport:
    """Runs the recorded prompts through `model` and compares. `without` (the adapter off) lets the report tell noise from error.

    With a tokenizer, also requires that it still encodes the prompts to the recorded tokens.
    """
    precision = precision or precision_of(model)
    if tokenizer is not None and probes.prompts != encode_prompts(tokenizer):
        return _failed(probes, precision, "the tokenizer encodes the probe prompts to other tokens than those recorded")
    tuned = last_logits(model, probes.prompts)
    with without() if without else nullcontext():
        base = last_logits(model, probes.prompts) if without else None
    return compare(probes, tuned, base, precision, _device_kind(model))


def compare(
    probes: Probes, tuned: Tensor, base: Tensor | None, precision: str, device: str, *, logprobs: bool = False, same_files: bool = False
) -> ProbeReport:  # fmt: skip
    """The rule itself, on [P, vocab] last-position logits however they were computed (an engine gives its own).

    `logprobs`: what is given are log-probabilities, which differ from logits by one number a prompt. Then error, effect and noise are
    those of the recorded ids' logits less their mean.
    `same_files`: the base's digest was compared. A narrow base that gives other logits all the same is held in another form (its scales
    quantised once or twice, it itself quantised from fp32 or bf16), and judged as another precision.
    """
    name = probes.nearest_name(precision)
    record = probes.nearest(precision)
    if tuned.shape[0] != record.ids.shape[0] or tuned.shape[1] <= int(record.ids.max()):
        return _failed(probes, precision, f"logits of shape {list(tuned.shape)} cannot hold the recorded ids; another vocabulary")
    tuned, base = tuned.gather(1, record.ids), None if base is None else base.gather(1, record.ids)
    if logprobs:
        record = replace(record, tuned=_levelled(record.tuned), base=None if record.base is None else _levelled(record.base))
        tuned, base = _levelled(tuned), None if base is None else _levelled(base)
    error, effect = _distance(tuned, record.tuned), record.effect
    noise = None if base is None or record.base is None else _distance(base, record.base)
    otherwise_held = same_files and precision.endswith(IN_FP32) and noise is not None and noise > ABSOLUTE
    same = name == precision and is_exact(precision) and record.device == device and not otherwise_held
    seen = effect if base is None or effect is None else min(effect, _distance(tuned, base))
    limit = ABSOLUTE if seen is None else min(ABSOLUTE, SHARE * seen) if same else SHARE * seen  # a record cannot widen it
    facts = f"error {error:.3g} of at most {limit:.3g} ({precision} on {device} against {name} on {record.device}"
    facts += ")" if effect is None else f"; the adapter's own effect is {effect:.3g})"
    noisy = noise is not None and noise > limit
    passed = error <= limit and not (same and noise is not None and noise > ABSOLUTE)
    if effect is not None and effect <= ZERO_EFFECT:
        passed, reason = False, "the recorded adapter has no effect"
    elif passed:
        reason = facts
    elif noisy and same:
        reason = f"the bare base differs by {noise:.3g} from the one recorded: another base? {facts}"
    elif noisy:
        reason = f"{precision}'s own noise on the bare base, {noise:.3g}, exceeds the budget: verify in fp32; {facts}"
    else:
        reason = f"another adapter, or one bound in part: {facts}"
    return ProbeReport(passed, error, effect, noise, limit, precision, name, bool(not passed and noisy and not same), reason)


def is_exact(precision: str) -> bool:
    """Computed in fp32 or better: a device repeats itself to `ABSOLUTE`."""
    return precision in EXACT or precision.endswith(IN_FP32)


def precision_of(model: nn.Module) -> str:
    """The dtype most of the model's floating-point parameters are held in (adapters in fp32 over a bf16 base count as bf16)."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in PRECISIONS:
            sizes[PRECISIONS[parameter.dtype]] = sizes.get(PRECISIONS[parameter.dtype], 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])


def _failed(probes: Probes, precision: str, reason: str) -> ProbeReport:
    return ProbeReport(False, float("inf"), probes.effect(), None, 0.0, precision, probes.nearest_name(precision), False, reason)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where either is not finite, so that NaN never compares as near."""
    difference = (a.double() - b.double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")


def _levelled(logits: Tensor) -> Tensor:
    """[P, K], each prompt's less their mean."""
    return logits - logits.double().mean(-1, keepdim=True)


def _device_kind(model: nn.Module) -> str:
    return next(parameter.device.type for parameter in model.parameters())


def _require_sound(records: dict[str, Recorded], lengths: list[int], num_tokens: int, folder: Path) -> None:
    sound = bool(records) and bool(lengths) and min(lengths) > 0 and sum(lengths) == num_tokens
    for record in records.values():
        parts = [record.tuned] if record.base is None else [record.tuned, record.base]
        sound = (
            sound
            and record.ids.dtype == torch.int64
            and record.ids.dim() == 2
            and record.ids.shape[0] == len(lengths)
            and int(record.ids.min()) >= 0
        )
        sound = sound and all(part.shape == record.ids.shape and bool(torch.isfinite(part).all()) for part in parts)
    if not sound:
        raise IntegrityError("these probes contradict themselves", where=folder / TENSORS, remedy="they were altered; record them again")
