"""What axolotl and LLaMA-Factory take from Hugging Face alike: batch sizes, schedules, precision, loggers, quantised bases.

In: an Importing. Out: recipe values and fates of those keys. Runs in: a person's terminal.
"""

from __future__ import annotations

from typing import Any

from ftcore.data.families import template_names
from ftcore.importers.base import Importing, number
from ftcore.methods.base import METHODS
from ftcore.stages.base import STAGES

SCHEDULES = {
    "cosine": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
}  # fmt: skip
LOGGERS = ("tensorboard", "wandb", "mlflow")


def moved(importing: Importing, table: dict[str, str]) -> None:
    """Keys that only change their name; null keeps our default."""
    for key, path in table.items():
        if key not in importing.config:
            continue
        if importing.get(key) is None:
            importing.tell(key, "default", f"unset there; {path} keeps its default")
        else:
            importing.move(key, path, number(importing.get(key)))


def batch(importing: Importing, micro_key: str, accumulate_key: str) -> None:
    """Their micro-batch x accumulation x GPUs is our optim.batch_size; the GPUs are not in these files unless a Ray key says it."""
    micro, accumulate = importing.get(micro_key) or 1, importing.get(accumulate_key) or 1
    workers = importing.get("ray_num_workers") or 1
    total = int(micro) * int(accumulate) * int(workers)
    note = f"{micro} x {accumulate} x workers {workers}; theirs grows with the GPUs it is started on, ours does not"
    importing.put("optim.batch_size", total)
    if micro_key in importing.config:
        importing.move(micro_key, "backend.micro_batch", int(micro), f"and optim.batch_size: {total} = {note}")
    if accumulate_key in importing.config:
        importing.tell(accumulate_key, "translated", f"optim.batch_size: {total} ({note})")
    if "ray_num_workers" in importing.config:
        importing.move("ray_num_workers", "resources.workers", int(workers))


def schedule(importing: Importing, key: str) -> None:
    kind = importing.get(key)
    if key not in importing.config:
        return
    if kind in SCHEDULES:
        importing.move(key, "optim.schedule", SCHEDULES[kind])
    elif kind is None:
        importing.tell(key, "default", "unset there; optim.schedule keeps its default")
    else:
        importing.tell(key, "not supported", "optim.schedule is cosine, linear or constant; cosine is kept")


def warmup(importing: Importing) -> None:
    """`warmup_steps` wins over `warmup_ratio`, as it does there; both are optim.warmup here (below 1: a share)."""
    steps, ratio = number(importing.get("warmup_steps")), number(importing.get("warmup_ratio"))
    if steps:
        importing.move("warmup_steps", "optim.warmup", steps)
        if ratio:
            importing.tell("warmup_ratio", "ignored", "warmup_steps is set too, and wins")
    elif ratio is not None:
        importing.move("warmup_ratio", "optim.warmup", ratio)
    elif "warmup_steps" in importing.config and steps is not None:
        importing.move("warmup_steps", "optim.warmup", 0)


def precision(importing: Importing) -> None:
    """bf16 / fp16 flags -> model.dtype; `auto` is bf16."""
    chosen = "fp32"
    for key, dtype in (("fp16", "fp16"), ("float16", "fp16"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("pure_bf16", "bf16")):
        if importing.get(key):
            chosen = dtype
    for key in ("bf16", "bfloat16", "pure_bf16", "fp16", "float16", "float32"):
        if importing.get(key):
            importing.tell(key, "translated", f"model.dtype: {chosen}")
    if chosen == "fp32" and not any(key in importing.config for key in ("bf16", "bfloat16", "fp16", "float16")):
        chosen = "bf16" if importing.program == "axolotl" else "fp32"
    importing.put("model.dtype", chosen)
    if chosen == "fp16":
        importing.put("resources.gpus_per_worker", 1)


def quantised(importing: Importing, bits: int, keys: tuple[str, ...]) -> None:
    """A 4- or 8-bit base: method qlora where this version has it, else lora over the full base, and said so."""
    for key in keys:
        if not importing.get(key):
            continue
        if "qlora" in METHODS:
            importing.put("method.kind", "qlora")
            importing.put("method.bits", bits)
            importing.tell(key, "translated", f"method: {{kind: qlora, bits: {bits}}}")
        else:
            importing.tell(key, "not supported", "this version has no quantised bases; the recipe trains lora on the base as it is")


def stage(importing: Importing, key: str, kind: str) -> None:
    importing.put("stage.kind", kind)
    if kind in STAGES:
        importing.tell(key, "translated", f"stage.kind: {kind}")
    else:
        importing.tell(
            key, "not supported", f"this version has no stage `{kind}` (it has {', '.join(STAGES)}); the recipe will not validate"
        )


def template(importing: Importing, key: str, known: dict[str, str]) -> None:
    """A template's name there -> ours; where it has none here, the tokenizer's own is used."""
    name = importing.get(key)
    ours = known.get(str(name)) or (name if name in template_names() else None)
    if ours:
        importing.move(key, "model.chat_template", ours)
    elif name:
        importing.tell(key, "not supported", "not a template name here; the tokenizer's own is used (model.chat_template: auto)")


def loggers(importing: Importing, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value or [])
    known = [name for name in names if name in LOGGERS]
    if known:
        importing.move(key, "output.loggers", known)
    elif names and names != ["none"]:
        importing.tell(key, "not supported", f"loggers are {', '.join(LOGGERS)}; metrics.jsonl is always written")
    else:
        importing.tell(key, "default", "no outside logger; metrics.jsonl is always written")
