"""What ZeRO trained, made whole again: one parameter at a time is gathered, checked against the shards it came from, and written.

In: a model whose weights may be sharded. Out: gathered adapters; a Hugging Face folder of sharded safetensors. Runs in: train workers, all
ranks together; rank 0 writes, and no rank ever holds the whole model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ftcore.backends.base import World
from ftcore.errors import IntegrityError, ModelError
from ftcore.export.modelcard import render_trained
from ftcore.safetensors_stream import TensorFile, TensorPlan
from ftcore.weights import INDEX, SINGLE
from ftcore.zero_runtime import gathering, is_sharded, own_run, shape_of

SHARD_BYTES = 5 << 30
Reduce = Callable[[list[float]], list[float]]
Named = list[tuple[str, nn.Parameter]]


def gathered(parameters: Named, world: World, reduce: Reduce) -> Iterator[tuple[str, Tensor]]:
    """(name, the whole parameter) one by one; on ranks other than 0 the tensor is empty. All ranks iterate together.

    Raises IntegrityError, on every rank, when what was gathered is not what the shards hold: an ungathered parameter is an empty tensor,
    and saving those is how adapters trained under stage 3 come out empty.
    """
    for name, parameter in parameters:
        squares = _squares_held(parameter, world)
        with gathering(parameter):
            whole = parameter.detach().to("cpu", copy=True) if world.is_main else torch.empty(0)
        fits = not world.is_main or tuple(whole.shape) == shape_of(parameter)
        [wanted, misfits, got] = reduce([squares, float(not fits), _squares(whole) if world.is_main else 0.0])
        if misfits or not math.isclose(wanted, got, rel_tol=1e-6, abs_tol=1e-30):
            raise IntegrityError(
                "a gathered parameter is not what its shards hold", where=name,
                got=f"shape {list(whole.shape)}, norm {math.sqrt(got):.6g}" if world.is_main else f"norm {math.sqrt(got):.6g}",
                wanted=f"shape {list(shape_of(parameter))}, norm {math.sqrt(wanted):.6g}",
                remedy="nothing was saved; the last checkpoint holds the trained weights. Please report this",
            )  # fmt: skip
        yield name, whole


def _squares_held(parameter: nn.Parameter, world: World) -> float:
    """This rank's addend to the parameter's sum of squares: of its shard (without the padding), or on rank 0 of a replicated one."""
    if not is_sharded(parameter):
        return _squares(parameter) if world.is_main else 0.0
    start, numel = own_run(parameter, world.rank)
    if parameter.ds_tensor.numel() < numel:  # it rests on NVMe
        with gathering(parameter):
            return _squares(parameter.reshape(-1)[start : start + numel])
    return _squares(parameter.ds_tensor.reshape(-1)[:numel])


def _squares(tensor: Tensor) -> float:
    """Sum of squares in fp64, a piece at a time."""
    return math.fsum(float(piece.double().square().sum()) for piece in tensor.detach().reshape(-1).split(1 << 22))


def export_model(model: nn.Module, folder: Path, dtype: torch.dtype, world: World, reduce: Reduce) -> None:
    """Streams the whole model in `dtype` into `folder`, as `from_pretrained` reads it, and reads every byte back.

    Raises ModelError where `refuse_merges` does."""
    refuse_merges(model, dtype)
    parameters = list(model.named_parameters())
    plans = _plans(model, dtype)
    kept = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    flat = [plan for outputs in plans.values() for plan in outputs]
    flat += [TensorPlan(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()]
    with ExitStack() as stack:
        files = _open_files(folder, flat, stack) if world.is_main else {}
        for name, whole in gathered(parameters, world, reduce):
            if world.is_main:
                for key, tensor in revert_weight_conversion(model, {name: whole.to(dtype)}).items():
                    files[key].write(key, tensor)
        for name, buffer in buffers.items() if world.is_main else ():
            files[name].write(name, buffer)
    if world.is_main:
        for file in set(files.values()):
            file.read_back()
        _write_facts(model, folder, dtype, sum(plan.num_bytes for plan in flat), files)


def _plans(model: nn.Module, dtype: torch.dtype) -> dict[str, list[TensorPlan]]:
    return {name: _written_as(model, name, shape_of(parameter), dtype) for name, parameter in model.named_parameters()}


def _written_as(model: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorPlan]:
    """What transformers' files call this parameter, and into what they cut it (fused experts, for one)."""
    outputs = revert_weight_conversion(model, {name: torch.empty(shape, dtype=dtype, device="meta")})
    return [TensorPlan(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in outputs.items()]


def refuse_merges(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises ModelError when this architecture's files merge several parameters into one tensor: those cannot be written one by one."""
    shapes = {name: torch.empty(shape_of(p), dtype=dtype, device="meta") for name, p in model.named_parameters()}
    together = {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, shapes).items()}
    alone = {plan.name: plan.shape for outputs in _plans(model, dtype).values() for plan in outputs}
    if alone != together:
        odd = sorted(key for key in together.keys() | alone.keys() if together.get(key) != alone.get(key))
        raise ModelError(
            "the files of this architecture merge parameters that are trained apart", where=type(model).__name__, got=odd[0],
            wanted="one tensor a parameter", remedy="train it with backend.zero=2, or with lora",
        )  # fmt: skip


def _open_files(folder: Path, plans: list[TensorPlan], stack: ExitStack) -> dict[str, TensorFile]:
    """Tensor name -> the file it goes into, cut at SHARD_BYTES, named as transformers names them."""
    groups: list[list[TensorPlan]] = [[]]
    for plan in plans:
        if groups[-1] and sum(p.num_bytes for p in groups[-1]) + plan.num_bytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(plan)
    found: dict[str, TensorFile] = {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = stack.enter_context(TensorFile(folder / name, group, {"format": "pt"}))
        found |= {plan.name: file for plan in group}
    return found


def _write_facts(model: nn.Module, folder: Path, dtype: torch.dtype, num_bytes: int, files: dict[str, TensorFile]) -> None:
    """Index, config, generation config, model card."""
    if len({file.path for file in files.values()}) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": {name: file.path.name for name, file in sorted(files.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    model.config.save_pretrained(folder)
    config = folder / "config.json"  # it says what the model trains with; its users want the weights' dtype, and the cache
    facts = {"dtype": str(dtype).removeprefix("torch."), "use_cache": True, "architectures": [type(model).__name__]}
    config.write_text(json.dumps(json.loads(config.read_text()) | facts, indent=2))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    size = sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
    (folder / "README.md").write_text(render_trained(model.config._name_or_path, str(facts["dtype"]), size), encoding="utf-8")
