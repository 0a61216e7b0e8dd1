"""Plan probe: the time of a step, measured on this machine with two shallow models of the recipe's width.

In: a Forecast, a worker's threads. Out: seconds to the last step. Runs in: the driver, on `ftcore plan --probe` alone; loads torch, but
never the weights.

Layers are alike, so a micro-step takes t(L) = t(1) + (L - 1) (t(2) - t(1)): embedding, head and loss are in t(1). Data loading, waiting for
other ranks and the optimizer's update are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftcore.activations import Pass
from ftcore.backends.base import World
from ftcore.data.collate import collate
from ftcore.data.identity import model_config
from ftcore.data.types import Block
from ftcore.data_parallel import PlainStepper
from ftcore.errors import ConfigError
from ftcore.forecast import Forecast
from ftcore.models import DTYPES, CausalModel, autocast_dtype, choose_layout
from ftcore.recipe import Recipe

TIMES = 3
"""The first micro-step of a process is slower than all others; the fastest of these counts."""


def probe(known: Forecast, threads: int) -> float | None:
    """None where the number of steps is unknown. Raises ConfigError for what two shallow models cannot stand for, and for a GPU that is not
    here. `threads`: that a worker computes with."""
    recipe, layers = known.recipe, len(known.shape.layers)
    if recipe.method.quantises or recipe.backend.kind != "plain":
        raise ConfigError(
            "the probe knows neither quantised bases nor sharded ones", where="--probe",
            got=f"method {recipe.method.kind}, backend {recipe.backend.kind}", wanted="method full or lora, backend plain",
            remedy="leave --probe away, and give --gpu NAME",
        )  # fmt: skip
    if recipe.resources.gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError(
            "the probe finds no GPU on this machine, and a CPU's time is not a GPU's", where="--probe",
            got=f"resources.gpus_per_worker: {recipe.resources.gpus_per_worker:g}", wanted="a CUDA device that torch can use",
            remedy="probe on the machine that will train, or leave --probe away, and give --gpu NAME",
        )  # fmt: skip
    if known.steps is None:
        return None
    with _computing_with(threads):
        one, two = (_micro_step_s(recipe, known.pass_(), num_layers) for num_layers in (1, 2))
    return known.steps * known.micro_steps * (one + (layers - 1) * max(0.0, two - one))


def probed_device(recipe: Recipe, threads: int) -> str:
    """What was measured, in words."""
    if recipe.resources.gpus_per_worker:
        return f"this machine's {torch.cuda.get_device_name()}"
    return f"this machine, {threads} thread{'s' * (threads != 1)}"


@contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    """As a worker does (cluster.runtime_env.worker_variables); torch by itself takes every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _micro_step_s(recipe: Recipe, at: Pass, num_layers: int) -> float:
    device = "cuda" if recipe.resources.gpus_per_worker else "cpu"
    facts = model_config(recipe.model)
    facts = dict(facts.get("text_config", facts)) | {"num_hidden_layers": num_layers}
    facts.pop("layer_types", None)  # one for each layer; transformers makes it anew
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[recipe.model.dtype]).to(device)
    base.config.use_cache, base.name_or_path = False, recipe.model.path
    base.config._name_or_path = recipe.model.path
    model = recipe.method.apply(base)
    if recipe.backend.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    stepper = PlainStepper(model, recipe.optim, 1, World(device=device), autocast_dtype(recipe.model.dtype))
    layout = stepper.run(lambda: choose_layout(base, recipe.model.attention, packs=False))
    policy = stepper.run(lambda: CausalModel(model, layout))
    batch = collate(_blocks(at, config.get_text_config().vocab_size), padded=layout == "padded").to(device)
    model.train()
    took = []
    for _ in range(TIMES):
        started = time.perf_counter()
        float(stepper.micro_step(lambda: policy.cross_entropy(batch), scale=1 / max(1, batch.num_trained), last=True))  # waits for a GPU
        took.append(time.perf_counter() - started)
    stepper.close()
    return min(took)


def _blocks(at: Pass, vocabulary: int) -> list[Block]:
    """Segments as long as the longest may be, and one with the rest."""
    whole, rest = divmod(at.tokens, at.longest)
    lengths = np.array([at.longest] * whole + [rest] * (rest > 0), np.int32)
    ids = np.random.default_rng(0).integers(0, vocabulary, at.tokens).astype(np.int32)
    return [Block(ids=ids, mask=np.ones(at.tokens, np.uint8), lengths=lengths, rows=np.arange(len(lengths)))]
