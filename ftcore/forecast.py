"""Forecast: what a run will take, told before it is launched: memory of a rank, disk, network, steps and time.

In: a recipe; the model's config.json; the lengths of its blocks where they are prepared. Out: a Forecast, which refuses what cannot fit.
Runs in: the driver; no torch, no transformers, no ray, no weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from ftcore.activations import Pass
from ftcore.alternatives import Alternative, nearest, one_step_away
from ftcore.backends.deepspeed import DeepSpeed
from ftcore.data.identity import identity, model_config
from ftcore.data.order import Order
from ftcore.data.prepared import Prepared
from ftcore.data.sources import list_files
from ftcore.devices import MODEL_FLOPS_SHARE, Device
from ftcore.errors import ConfigError, FtcoreError, ModelError
from ftcore.memory import BYTES, GIB, Host, Load, Need, master_bytes, moments_bytes, need, precision
from ftcore.moved import Moved, moved
from ftcore.recipe import Recipe
from ftcore.shapes import Shape, shape_of_config
from ftcore.storage import Folder, digest_of, is_sealed

TIGHT = 0.9
"""Above this share of the memory a forecast that is 10 % too low would end the run."""
BYTES_PER_TOKEN = 4
"""Of rows that are not prepared yet: what English text and JSON usually come to."""
Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Volume:
    """How much there is to train on. `top`: tokens of the longest blocks, as many as a micro-step may hold; () where unknown."""

    blocks: int | None
    tokens: int | None
    top: tuple[int, ...]
    said: str


@dataclass(frozen=True)
class Forecast:
    """Everything `ftcore plan` prints. Bytes are of the rank that holds most."""

    recipe: Recipe
    shape: Shape
    moves: Moved
    need: Need
    volume: Volume
    steps: int | None
    notes: tuple[str, ...]

    def verdict(self, memory: float, hosts: Sequence[Host] = ()) -> Verdict:
        """`memory`: bytes that one rank may take of its device. `hosts`: of GPU workers, where they will sit; () where nobody knows."""
        return verdict_of(self.need, memory, hosts)

    def fullest(self, hosts: Sequence[Host]) -> Host | None:
        """The host that this run fills most."""
        return max(hosts, key=lambda host: host.takes(self.need) / max(host.gib, 1e-9)) if self.need.on_gpu and hosts else None

    def require_fits(self, memory: float, hosts: Sequence[Host] = ()) -> None:
        """Raises ConfigError with the nearest configuration that fits in `memory` bytes a rank, and on all of the hosts."""
        if self.verdict(memory, hosts) != "does not fit":
            return
        found = self.nearest(memory, hosts)
        remedy = (
            pasted(found) if found else "no change of this recipe that is known here would fit: take a smaller model, or larger devices"
        )
        host = self.fullest(hosts)
        if host is not None and self.verdict(memory) != "does not fit":
            largest = max((part for part in self.need.parts if part.on_host), key=lambda part: part.bytes)
            raise ConfigError(
                "this run needs more memory than its workers' host has", where=f"beside the GPUs, most of it {largest.name}",
                got=f"{host.gib:.1f} GiB by {host.workers(self.need)} worker(s) ({host.name})",
                wanted=f"{host.takes(self.need):.1f} GiB", remedy=remedy,
            )  # fmt: skip
        phase = self.need.worst_phase
        largest = max((part for part in self.need.parts if phase in part.phases), key=lambda part: part.bytes)
        raise ConfigError(
            "this run needs more memory than a worker has", where=f"in phase `{phase}`, most of it {largest.name}",
            got=f"{memory / GIB:.1f} GiB a worker", wanted=f"{self.need.peak / GIB:.1f} GiB", remedy=remedy,
        )  # fmt: skip

    def nearest(self, memory: float, hosts: Sequence[Host] = ()) -> Alternative | None:
        """Not tight, if there is such a one."""
        needed = partial(_need, shape=self.shape, volume=self.volume)
        return nearest(self.recipe, needed, lambda need: verdict_of(need, memory, hosts) == "fits") or nearest(
            self.recipe, needed, lambda need: verdict_of(need, memory, hosts) == "tight"
        )

    def alternatives(self) -> Iterator[Alternative]:
        return one_step_away(self.recipe, partial(_need, shape=self.shape, volume=self.volume))

    @cached_property
    def checkpoint_bytes(self) -> int:
        moments = 8 * self.moves.count if isinstance(self.recipe.backend, DeepSpeed) else moments_bytes(self.recipe, self.moves)
        return self.moves.count * master_bytes(self.recipe) + moments

    @property
    def disk_bytes(self) -> int:
        """Of the run folder at its fullest (kept ones, the best, the one being written; then the result), and the published adapter."""
        adapter = self.recipe.method.is_adapter
        result = self.moves.count * 4 if adapter else self.shape.num_parameters * BYTES[self.recipe.model.dtype]
        published = result if self.recipe.output.adapter is not None else 0
        return (self.recipe.output.keep + 2) * self.checkpoint_bytes + result + published

    @property
    def network_bytes(self) -> int:
        """That each rank sends in one step, by ring algorithms: (N-1)/N of what is reduced or gathered, twice for an all-reduce."""
        ranks = self.recipe.resources.max_workers
        gradients = self.moves.count * master_bytes(self.recipe)
        backend, micro_steps = self.recipe.backend, self.micro_steps
        if not isinstance(backend, DeepSpeed) or backend.zero == 1:
            return 2 * gradients * (ranks - 1) // ranks
        if backend.zero == 2:
            return gradients * (micro_steps + 1) * (ranks - 1) // ranks  # reduced to its owner at each micro-step; weights gathered once
        passes = 3 if backend.gradient_checkpointing else 2  # weights are gathered forward, backward, and for what is computed again
        gathered = self.shape.num_parameters * BYTES[self.recipe.model.dtype] * passes
        return micro_steps * (gathered + gradients) * (ranks - 1) // ranks

    @property
    def micro_steps(self) -> int:
        """Of the busiest rank in one step."""
        return -(-self.recipe.optim.batch_size // (self.recipe.resources.max_workers * self.recipe.backend.micro_batch))

    def seconds(self, device: Device) -> float | None:
        """To the last step on `device`, by its datasheet; None where the number of steps is unknown."""
        if self.steps is None:
            return None
        step = self.step_flops / (device.tflops * 1e12 * MODEL_FLOPS_SHARE)
        update = 7 * self.moves.count * master_bytes(self.recipe) / (device.gb_per_s * 1e9)  # weight, gradient, moments: read and written
        return self.steps * (step + update)

    @property
    def step_flops(self) -> float:
        """Of one worker in one step: 2 a multiplied weight forward, 2 for the inputs' gradients, 2 for the weights' where trained, 2 again
        for what is recomputed; attention's products of queries and keys beside them."""
        at = self.pass_()
        passes = 4 + 2 * self.moves.full + 2 * self.recipe.backend.gradient_checkpointing
        attention = 2 * len(self.shape.layers) * self.shape.queries * at.longest  # causal: half of the square is computed
        return float(self.micro_steps * at.tokens * passes * (self.shape.num_active + attention))

    def pass_(self) -> Pass:
        return precision(self.recipe, self.moves, _load(self.recipe, self.shape, self.volume))


def forecast(recipe: Recipe) -> Forecast:
    """Raises ModelError for an architecture that cannot be counted, ConfigError for a method that is not known here."""
    config = model_config(recipe.model)
    if not config:
        raise ModelError(
            "there is no config.json to count the model from", where=recipe.model.path, wanted="a folder with one, or a hub name"
        )
    shape = shape_of_config(config, f"{recipe.model.path}/config.json")
    volume = _volume(recipe)
    steps = _num_steps(recipe, volume)
    moves = moved(shape, recipe.method)
    notes = [text for text in (shape.assumed, volume.said) if text]
    if recipe.method.quantises and any(layer.experts for layer in shape.layers):
        notes.append(f"experts are not quantised: they stay in {recipe.model.dtype}")
    if not shape.plain_head:
        notes.append("the head is more than a linear layer: the whole logits are made")
    if isinstance(recipe.backend, DeepSpeed) and recipe.backend.zero < 3:
        notes.append("ZeRO 1 and 2 are counted by formula; measured were stage 3 and the plain backend")
    return Forecast(recipe, shape, moves, need(recipe, shape, _load(recipe, shape, volume)), volume, steps, tuple(notes))


def verdict_of(need: Need, memory: float, hosts: Sequence[Host] = ()) -> Verdict:
    """The worst: on the device, and on each host."""
    pairs = [(need.peak, memory)] + [(host.takes(need), host.gib) for host in hosts if need.on_gpu]
    if any(taken > there for taken, there in pairs):
        return "does not fit"
    return "tight" if any(taken > TIGHT * there for taken, there in pairs) else "fits"


def pasted(found: Alternative) -> str:
    return " ".join(shlex.quote(text) for text in found.overrides)


def _need(recipe: Recipe, *, shape: Shape, volume: Volume) -> Need:
    return need(recipe, shape, _load(recipe, shape, volume))


def _load(recipe: Recipe, shape: Shape, volume: Volume) -> Load:
    """The largest micro-step: the longest blocks together (order.deal groups blocks of like size), or as long as the recipe allows."""
    count = min(recipe.backend.micro_batch, recipe.optim.batch_size)
    most = _most_tokens(recipe)
    top = volume.top[:count] or (most,) * count
    longest = min(max(top), recipe.data.max_length)
    varlen = shape.isolates and recipe.model.attention in ("auto", "varlen")
    steps = _num_steps(recipe, volume)
    overlaps = steps is None or steps > recipe.output.checkpoint_every
    return Load(sum(top) if varlen else len(top) * max(top), longest, varlen, overlaps)


def _most_tokens(recipe: Recipe) -> int:
    data = recipe.data
    if not recipe.stage.packs:
        return 2 * data.max_length  # the examples of one item share a block: an answer preferred and one rejected
    return (data.block_tokens or data.max_length) if data.pack else data.max_length


def _num_steps(recipe: Recipe, volume: Volume) -> int | None:
    if recipe.optim.max_steps is not None:
        return recipe.optim.max_steps
    if volume.blocks is None:
        return None
    return Order(volume.blocks, recipe.optim.batch_size, recipe.optim.seed).num_steps(recipe.optim.epochs, None)


def _volume(recipe: Recipe) -> Volume:
    """From the prepared blocks of exactly these rows; else by the size of the files, with blocks as long as they may be."""
    most = f"blocks are taken to hold {_most_tokens(recipe):,} tokens, the most that the recipe allows"
    try:
        prepared = _prepared(recipe)
        if prepared is not None:
            lengths = prepared.block_lengths("train")
            top = tuple(int(length) for length in sorted(lengths, reverse=True)[: recipe.optim.batch_size])
            return Volume(len(lengths), int(lengths.sum()), top, "")
        size = sum(
            file.size * (4 if file.gzipped else 1) * source.weight for source in recipe.data.sources for file in list_files(source.path)
        )
    except FtcoreError as error:
        return Volume(None, None, (), f"the rows cannot be looked at ({error.what}): {most}")
    tokens = int(size / BYTES_PER_TOKEN * (1 - recipe.data.validation - recipe.data.test))
    blocks = max(1, tokens // _most_tokens(recipe)) if recipe.data.pack and recipe.stage.packs else None
    return Volume(blocks, tokens, (), f"the rows are not prepared yet: {most}; about {BYTES_PER_TOKEN} bytes of a file a token")


def _prepared(recipe: Recipe) -> Prepared | None:
    cache = Folder(recipe.data.cache)
    if cache.is_local and not cache.path.is_dir():
        return None  # nothing was ever prepared here: the sources need not be hashed
    place = cache / digest_of(identity(recipe, cache))
    return Prepared.open(place) if is_sealed(place) else None
