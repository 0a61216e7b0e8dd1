"""Combinations that cannot work, found before anything is started: what no single key can know.

In: a recipe whose keys are each valid. Out: (path, sentence) for each impossible pair; notes on what works but is probably not meant.
Runs in: everywhere a recipe is read; no torch, so only what can be known without a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftcore.data.families import template_names
from ftcore.data.formats.base import FORMATS
from ftcore.data.types import Text
from ftcore.evals.answered import LATER, LIKELIHOODS, SPECIAL
from ftcore.evals.metrics.base import METRICS
from ftcore.methods.qlora import Qlora

if TYPE_CHECKING:
    from ftcore.recipe import Recipe


def impossible(recipe: Recipe) -> list[tuple[str, str]]:
    """Every impossible combination as (path to show, what and what to do)."""
    checks = (_formats, _template, _precision, _quantised, _optimizer, _adapters, _schedule, _gate, _targets, _resources, _urls)
    return [*(problem for check in checks for problem in check(recipe)), *recipe.backend.refusals(recipe)]


def _formats(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each source's format exists and makes the kind of item the stage learns from."""
    wanted = type(recipe.stage).item
    fitting = [name for name, known in FORMATS.items() if issubclass(known.item, wanted)]
    for index, source in enumerate(recipe.data.sources):
        at = f"data.sources.{index}.format"
        if source.format == "auto":
            continue
        if source.format not in FORMATS:
            near = difflib.get_close_matches(source.format, list(FORMATS), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield at, f"unknown format; got {source.format}; wanted auto | {' | '.join(FORMATS)}{hint}"
        elif source.format not in fitting:
            yield (
                at,
                f"stage `{recipe.stage.kind}` learns from {wanted.__name__}; got {source.format}; wanted {' | '.join(fitting) or 'auto'}",
            )


def _template(recipe: Recipe) -> Iterator[tuple[str, str]]:
    name = recipe.model.chat_template
    if name != "auto" and not name.endswith(".jinja") and name not in template_names():
        near = difflib.get_close_matches(name, template_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield "model.chat_template", f"unknown template; got {name}; wanted auto | a .jinja file | {' | '.join(template_names())}{hint}"


def _precision(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.model.dtype == "fp16" and recipe.resources.gpus_per_worker == 0:
        yield "model.dtype", "fp16 trains on GPUs only and resources.gpus_per_worker is 0; take bf16 or fp32, or ask for a GPU"
    if recipe.data.pack and recipe.stage.packs and recipe.model.attention in ("sdpa", "eager"):
        yield (
            "model.attention",
            f"{recipe.model.attention} attention cannot keep packed segments apart; take auto or varlen, or set data.pack: false",
        )


def _quantised(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What a quantised base can be computed in: autocast brings everything to model.dtype, and only it scales fp16's losses."""
    method, dtype = recipe.method, recipe.model.dtype
    if method.quantises and dtype == "fp64":
        yield (
            "model.dtype",
            f"method `{method.kind}` holds the base in {method.held(dtype)}, and fp64 has no quantised form; take fp32 or bf16",
        )
    if not isinstance(method, Qlora) or method.held_as.computes_in(dtype) in (dtype, "bf16" if dtype == "fp32" else dtype):
        return
    at, wanted = "method.compute_dtype", method.compute_dtype
    if wanted == "fp16" and recipe.resources.gpus_per_worker == 0:
        yield at, "fp16 computes on GPUs only and resources.gpus_per_worker is 0; take auto, or ask for a GPU and set model.dtype: fp16"
    elif wanted == "fp16":
        yield (
            at,
            f"gradients in fp16 need the loss scaling that comes with model.dtype: fp16; got model.dtype: {dtype}; set it, or take auto",
        )
    else:
        yield at, f"under model.dtype: {dtype} everything is computed in {dtype}, so {wanted} would do nothing; set model.dtype: {wanted}"


def _optimizer(recipe: Recipe) -> Iterator[tuple[str, str]]:
    kind = recipe.optim.kind
    if kind.startswith("paged") and recipe.resources.gpus_per_worker == 0:
        plain = kind.removeprefix("paged_")
        yield "optim.kind", f"{kind} pages between a GPU and the host, and resources.gpus_per_worker is 0; take {plain}, or ask for a GPU"
    if kind != "adamw" and recipe.backend.kind == "deepspeed":
        yield "optim.kind", f"backend `deepspeed` has its own sharded AdamW; got {kind}; take adamw, or backend: plain"
    if kind != "adamw" and recipe.model.dtype == "fp64":
        yield "optim.kind", f"{kind} keeps its state in fp32 or less; with model.dtype: fp64 take adamw"


def _adapters(recipe: Recipe) -> Iterator[tuple[str, str]]:
    method, stage = recipe.method, recipe.stage
    if not method.is_adapter:
        if recipe.output.adapter is not None:
            yield (
                "output.adapter",
                f"method `{method.kind}` makes a whole model, and the store holds adapters; "
                "remove this key (the model is in the run's final/ folder) or take an adapter method",
            )
        if recipe.model.adapter is not None:
            yield "model.adapter", f"method `{method.kind}` cannot continue from an adapter; merge it first (`ftcore merge`) and train that"
    if stage.needs_reference and not method.keeps_base:
        yield "stage.kind", f"stage `{stage.kind}` compares with the untouched base, which method `{method.kind}` overwrites; take lora"
    if recipe.output.sign_key is not None and recipe.output.adapter is None:
        yield "output.sign_key", "nothing is published, so nothing would be signed; set output.adapter or remove this key"


def _schedule(recipe: Recipe) -> Iterator[tuple[str, str]]:
    optim, data = recipe.optim, recipe.data
    if optim.max_steps is not None and optim.warmup >= 1 and optim.warmup > optim.max_steps:
        yield "optim.warmup", f"the warm-up ({optim.warmup:g} steps) is longer than the run (optim.max_steps is {optim.max_steps})"
    validates = data.validation > 0 or any(source.split == "validation" for source in data.sources)
    if recipe.eval.patience is not None and not validates:
        yield "eval.patience", "early stopping needs validation rows; set data.validation above 0 or a source with split: validation"
    if all(source.split in ("validation", "test") for source in data.sources):
        yield "data.sources", "no source has rows to train on: every one is split: validation or test"


def _gate(recipe: Recipe) -> Iterator[tuple[str, str]]:
    gate, data = recipe.output.gate, recipe.data
    if gate is None:
        return
    if gate.metric not in METRICS:
        yield "output.gate.metric", _unknown_metric(gate.metric)
    elif set(LATER).intersection(METRICS[gate.metric].needs):
        yield "output.gate.metric", f"a gate asks no judge; got {gate.metric}; take a metric that needs the answers alone"
    elif not SPECIAL.isdisjoint(METRICS[gate.metric].needs):
        yield "output.gate.metric", f"{gate.metric} is judged on rows of its own, not on the recipe's test rows; take another metric"
    elif type(recipe.stage).item is Text and not set(LIKELIHOODS).issuperset(METRICS[gate.metric].needs):
        yield "output.gate.metric", f"documents (stage `{recipe.stage.kind}`) have no answers; got {gate.metric}; take perplexity"
    if recipe.output.adapter is None or not recipe.output.promote:
        yield (
            "output.gate",
            "nothing is promoted, so nothing is held back; set output.adapter and leave output.promote on, or remove this key",
        )
    if data.test == 0 and all(source.split != "test" for source in data.sources):
        yield "output.gate", "a gate judges on test rows; set data.test above 0, or a source with split: test"


def _targets(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name in recipe.eval.targets:
        if name not in METRICS:
            yield "eval.targets", _unknown_metric(name)


def _unknown_metric(name: str) -> str:
    near = difflib.get_close_matches(name, list(METRICS), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown metric; got {name}; wanted {' | '.join(METRICS)}{hint}"


def _resources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    gpus, workers = recipe.resources.gpus_per_worker, recipe.resources.max_workers
    if gpus > 1 and gpus != int(gpus):
        yield "resources.gpus_per_worker", f"Ray hands out whole GPUs above one; got {gpus:g}; wanted {int(gpus)} or {int(gpus) + 1}"
    if 0 < gpus < 1 and workers > 1:
        yield (
            "resources.gpus_per_worker",
            f"{workers} workers cannot share a GPU in one process group (NCCL refuses); give each a whole one",
        )


def _urls(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """A recipe is copied into run folders and cards: nothing secret may stand in it."""
    places = {"model.path": recipe.model.path, "data.cache": recipe.data.cache}
    places |= {"output.runs": recipe.output.runs, "output.store": recipe.output.store}
    places |= {f"data.sources.{index}.path": source.path for index, source in enumerate(recipe.data.sources)}
    for at, path in places.items():
        if "@" in path.partition("://")[2].partition("/")[0]:
            yield (
                at,
                "a password in a URL would be written into run folders and cards; take it out: each machine's own credentials are used",
            )


def notes(recipe: Recipe) -> list[str]:
    """What works but is probably not meant; `ftcore validate` prints them."""
    found = []
    share = recipe.resources.max_workers * recipe.backend.micro_batch
    if recipe.optim.batch_size % share:
        found.append(
            f"optim.batch_size {recipe.optim.batch_size} is not a multiple of workers x micro_batch ({share}): "
            "some workers idle in part of each step"
        )
    if recipe.output.adapter is None and recipe.method.is_adapter:
        found.append("output.adapter is unset: the trained adapter stays in the run folder and is not published")
    if recipe.data.validation == 0 and all(source.split != "validation" for source in recipe.data.sources):
        found.append("there are no validation rows: over-fitting would not be seen")
    return found
