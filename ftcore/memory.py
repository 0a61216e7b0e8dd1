"""Memory: what one rank holds, part by part, before anything is launched.

In: a recipe, the model's Shape, the tokens of a micro-step. Out: Need: the parts, and how they add up in each phase of a run.
Runs in: the driver; no torch.

Every part names the code it comes from. Bytes lie on the device the rank computes on, or on its host; on a CPU both are one memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from ftcore.activations import Pass, added_by_backward, kept_between, kept_by_layer, narrow_weights
from ftcore.backends.deepspeed import DeepSpeed
from ftcore.loss_chunks import Head, loss_bytes
from ftcore.moved import Moved, base_bytes, moved
from ftcore.recipe import Recipe
from ftcore.shapes import Shape
from ftcore.zero_config import prefetched, reduce_bucket

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
CUDA_CONTEXT = 600 << 20
"""Driver context, cuBLAS workspaces and loaded kernels. Assumed: 0.4 to 0.7 GiB are usual on data-centre GPUs."""
NCCL_BUFFERS = 300 << 20
"""Channels of one communicator. Assumed."""
RUNTIME = 650 << 20
"""A worker's process with torch, transformers and peft imported; on a GPU it lies on the host."""
HEAP_HOLES = 0.25
"""Of a micro-step's tensors, on a CPU: what glibc's heap keeps between them, since workers never give freed memory back
(cluster.runtime_env.MALLOC). No bound, it depends on the order of sizes: probably because torch asks for aligned memory, which glibc
before 2.38 seldom takes from a hole of just that size. Seen: 2,647 MiB where 2,216 were held (0.2), and 2,096 where 1,392 were (LoRA, fp32,
over 2,048 tokens: 0.9)."""
SMALL_TENSOR = 4096
"""8-bit optimizers keep tensors below this in fp32 (optim.Optim.kind)."""

ONE_BASE = ("runtime", "CUDA context", "NCCL", "base", "base as stored")
"""Parts that trials over one base hold in common."""

Phase = Literal["load", "step", "checkpoint"]
PHASES: tuple[Phase, ...] = ("load", "step", "checkpoint")


@dataclass(frozen=True)
class Part:
    """Some bytes of one rank, and the phases in which they are held."""

    name: str
    bytes: int
    why: str
    phases: tuple[Phase, ...] = PHASES
    on_host: bool = False
    once: bool = False
    """Once a node: held by rank 0 alone, or pages of a file that all processes there share."""


@dataclass(frozen=True)
class Need:
    """One rank's memory. `peak` is what has to be there: of the device, or of the machine where the device is a CPU."""

    parts: tuple[Part, ...]
    on_gpu: bool
    workers: int = 1
    """How many there are of it: all; of those that share their state, the fewest."""

    def held(self, phase: Phase, *, on_host: bool = False) -> int:
        """Bytes held in a phase; on a CPU everything is held in one memory."""
        return sum(part.bytes for part in self.parts if phase in part.phases and (not self.on_gpu or part.on_host == on_host))

    @property
    def peak(self) -> int:
        return max(self.held(phase) for phase in PHASES)

    def of_trials(self, processes: int, guests: int) -> Need:
        """Of a search's trials beside each other, in each process `guests` that share its base (ftcore.shared)."""
        parts = [part if part.name in ONE_BASE else replace(part, bytes=part.bytes * guests) for part in self.parts]
        if self.workers == 1:  # each process is the rank 0 of its own run
            parts = [replace(part, once=part.once and part.name in ONE_BASE) for part in parts]
        return replace(self, parts=tuple(parts), workers=self.workers * processes)

    @property
    def worst_phase(self) -> Phase:
        return max(PHASES, key=self.held)

    @property
    def host_peak(self) -> int:
        """Of a GPU's worker, what its process takes on the host."""
        return self.on_one_host(1)

    def on_one_host(self, workers: int) -> int:
        """What so many GPU workers, rank 0 among them, take together of the host they sit on."""
        parts = [part for part in self.parts if part.on_host and self.on_gpu]
        return max(sum(part.bytes * (1 if part.once else workers) for part in parts if phase in part.phases) for phase in PHASES)


@dataclass(frozen=True)
class Host:
    """What GPU workers may take of one node's own memory. `seats`: how many of them it can hold."""

    name: str
    gib: float
    seats: int
    num_nodes: int = 1
    """That the workers are dealt out to evenly (placement SPREAD)."""

    def workers(self, need: Need) -> int:
        """How many of all workers will sit here at most."""
        return max(1, min(self.seats, -(-need.workers // self.num_nodes)))

    def takes(self, need: Need) -> float:
        """GiB of those workers together."""
        return need.on_one_host(self.workers(need)) / GIB


@dataclass(frozen=True)
class Load:
    """The tokens of the largest micro-step. `overlaps`: a checkpoint is written while steps go on (else only at the end)."""

    tokens: int
    longest: int
    varlen: bool
    overlaps: bool = True


def need(recipe: Recipe, shape: Shape, load: Load) -> Need:
    """Raises ConfigError for a method without a forecast, ModelError for targets that match nothing."""
    moves = moved(shape, recipe.method)
    on_gpu = recipe.resources.gpus_per_worker > 0
    is_zero = isinstance(recipe.backend, DeepSpeed)
    state = _sharded_state(recipe, recipe.backend, shape, moves) if isinstance(recipe.backend, DeepSpeed) else _state(recipe, shape, moves)
    parts = [*_process(recipe, on_gpu), *state, *_step(recipe, shape, moves, load)]
    parts += [] if is_zero else _snapshot(recipe, moves, load)
    workers = recipe.resources.min_workers if is_zero else recipe.resources.max_workers
    return Need(tuple(part for part in parts if part.bytes), on_gpu, workers)


def _process(recipe: Recipe, on_gpu: bool) -> list[Part]:
    found = [Part("runtime", RUNTIME, "Python, torch, transformers, peft", on_host=True)]
    if on_gpu:
        found.append(Part("CUDA context", CUDA_CONTEXT, "assumed"))
        if recipe.resources.max_workers > 1:
            found.append(Part("NCCL", NCCL_BUFFERS, "assumed"))
    return found


def master_bytes(recipe: Recipe) -> int:
    """Of one trained number (models.keep_masters)."""
    return 8 if recipe.model.dtype == "fp64" else 4


def _state(recipe: Recipe, shape: Shape, moves: Moved) -> list[Part]:
    """What the plain backend holds on every rank (data_parallel.PlainStepper)."""
    master, dtype = master_bytes(recipe), BYTES[recipe.model.dtype]
    base = 0 if moves.full else base_bytes(shape, recipe.method, dtype)
    trained = f"{moves.count:,} trained"
    found = [
        Part("base", base, f"{shape.num_parameters:,} parameters, {recipe.method.held(recipe.model.dtype)}"),
        Part("trained weights", moves.count * master, f"{trained}, {master} bytes (keep_masters)"),
        Part("gradients", moves.count * master, "one flat buffer a bucket (GradientBucket)", ("step", "checkpoint")),
        Part(
            "optimizer", moments_bytes(recipe, moves), f"two moments, {recipe.optim.kind}", ("step", "checkpoint"),
            on_host=recipe.optim.kind.startswith("paged"),
        ),
    ]  # fmt: skip
    if shape.stored != recipe.model.dtype and not recipe.method.quantises:
        found.append(
            Part("base as stored", shape.num_parameters * BYTES[shape.stored], f"pages of its {shape.stored} files", ("load",), True, True)
        )
    if moves.full and dtype < master:
        found.append(Part("base before masters", shape.num_parameters * dtype, "widened one by one (keep_masters)", ("load",)))
    return found


def moments_bytes(recipe: Recipe, moves: Moved) -> int:
    """Both moments: fp32, or 8 bits with an fp32 scale for 256 of them (optimizer_state)."""
    if "8bit" not in recipe.optim.kind:
        return 2 * moves.count * master_bytes(recipe)
    large = sum(count for count in moves.tensors if count >= SMALL_TENSOR)
    return 2 * (large + 4 * (large // 256)) + 8 * (moves.count - large)


def _sharded_state(recipe: Recipe, backend: DeepSpeed, shape: Shape, moves: Moved) -> list[Part]:
    """What DeepSpeed holds on one of N ranks; ZeRO (Rajbhandari et al. 2020, section 5), with the dtypes of zero.ZeroStepper.

    Elastic runs are counted with their fewest workers: there each holds most.
    """
    ranks, whole, dtype = recipe.resources.min_workers, backend.zero == 3, BYTES[recipe.model.dtype]
    halves = whole and moves.full and recipe.model.dtype == "bf16"  # DeepSpeed's own bf16: weights narrow, masters beside them
    weight = 2 if halves else 4
    base = 0 if moves.full else base_bytes(shape, recipe.method, dtype)
    share = ranks if whole else 1
    optimizer_away, weights_away = backend.offload_optimizer != "none", backend.offload_params != "none"
    modules = [linear.num_parameters for layer in shape.layers for linear in layer.linears]
    modules += [layer.experts.num_parameters for layer in shape.layers if layer.experts]
    gathered = (max(shape.embedding, *modules) + prefetched(backend)) * (weight if moves.full else dtype)
    gradients = moves.count * 4 // (1 if backend.zero == 1 else ranks)
    after_load: tuple[Phase, ...] = ("step", "checkpoint")
    return [
        Part("base", base // share, "frozen" + f", 1/{share}" * whole, on_host=weights_away),
        Part("trained weights", moves.count * weight // share, f"{moves.count:,} trained, {weight} bytes", on_host=weights_away),
        Part("masters", moves.count * 4 // ranks, f"fp32, 1/{ranks}", after_load, optimizer_away),
        Part("gradients", gradients, "fp32" + f", 1/{ranks}" * (backend.zero > 1), after_load, optimizer_away and backend.zero > 1),
        Part("optimizer", moves.count * 8 // ranks, f"two moments, fp32, 1/{ranks}", after_load, optimizer_away),
        Part("gathered weights", gathered if whole else 0, "the largest module's, and what is gathered ahead", after_load),
        Part("reduce bucket", 4 * reduce_bucket(backend, moves.count), "fp32 (zero_config.BUCKET)", after_load),
    ]


def _step(recipe: Recipe, shape: Shape, moves: Moved, load: Load) -> list[Part]:
    """Forward pass, loss, backward pass: the worst moment of the three, told apart in what the layers keep and what comes on top."""
    at = precision(recipe, moves, load)
    targets = moves.targets or (frozenset[str](),) * len(shape.layers)
    kinds = Counter(zip(shape.layers, targets, strict=True))  # most layers are alike: each kind is counted once
    kept = {kind: kept_by_layer(shape, *kind, moves, at) for kind in kinds}
    linear = recipe.stage.kind in ("sft", "pretrain") and not moves.head_wrapped
    weight = at.stream if moves.full else 4 if moves.head else BYTES[recipe.model.dtype]
    head = Head(shape.vocabulary, shape.hidden, at.stream, at.compute, weight, moves.head, linear, shape.plain_head)
    forward, backward = loss_bytes(head, load.tokens, load.tokens)  # every token trained: the worst case
    above = kept_between(shape, moves, at)
    added = added_by_backward(shape, moves, at, quantised=recipe.method.quantises)
    if recipe.backend.gradient_checkpointing:
        inputs = len(shape.layers) * load.tokens * shape.hidden * at.stream
        again = max(kept.values()) - (load.tokens * shape.hidden * at.stream if at.stream >= 4 else 0)  # its input is among the inputs kept
        name, held, why = "layer inputs", inputs, f"{len(shape.layers)} layers (gradient_checkpointing)"
        cached = sum(narrow_weights(layer, [], moves, at) * count for (layer, _), count in kinds.items()) if moves.full else 0
        rest = {"loss": above + max(cached + forward, backward), "one layer again, and its gradients": again + added}
    else:
        name, held, why = "activations", sum(kept[kind] * count for kind, count in kinds.items()), f"{load.tokens:,} tokens at once"
        rest = {"loss, by chunks": above + max(forward, backward), "gradients of activations": added}
    if isinstance(recipe.backend, DeepSpeed):  # it reduces a copy of a full bucket; what was kept for those gradients is gone by then
        bucket = reduce_bucket(recipe.backend, moves.count)
        rest["gradients, and a bucket under way"] = list(rest.values())[-1] + 4 * bucket - held * bucket // moves.count
    worst = max(rest, key=lambda key: rest[key])
    phases: tuple[Phase, ...] = ("step",)
    found = [Part(name, held, why, phases), Part(worst, rest[worst], "the worst moment of a micro-step", phases)]
    if recipe.resources.gpus_per_worker == 0 and not isinstance(recipe.backend, DeepSpeed):  # under ZeRO memory is given back at once
        found.append(Part("holes of the heap", int(HEAP_HOLES * (held + rest[worst])), "freed, and kept by the C library", phases))
    return found


def precision(recipe: Recipe, moves: Moved, load: Load) -> Pass:
    """How numbers flow: autocast over fp32 weights, or everything in the base's dtype (models.autocast_dtype, zero.ZeroStepper)."""
    dtype = BYTES[recipe.model.dtype]
    own_bf16 = isinstance(recipe.backend, DeepSpeed) and recipe.backend.zero == 3
    stream = dtype if not moves.full or own_bf16 else max(dtype, 4)
    return Pass(load.tokens, load.longest, stream, dtype, load.varlen, recipe.model.attention == "eager")


def _snapshot(recipe: Recipe, moves: Moved, load: Load) -> list[Part]:
    """Rank 0 copies what is trained and its optimizer's state (PlainStepper.snapshot), and the thread that writes it holds them."""
    copied = moves.count * master_bytes(recipe) + moments_bytes(recipe, moves)
    phases: tuple[Phase, ...] = ("step", "checkpoint") if load.overlaps else ("checkpoint",)
    return [Part("checkpoint's copy", copied, "weights and optimizer, on rank 0", phases, on_host=True, once=True)]
