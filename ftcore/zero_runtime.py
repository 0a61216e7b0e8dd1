"""DeepSpeed in this process: brought up quietly, without compiling anything, on the process group that is there; sharded loading.

In: this rank's World, the backend section. Out: an initialised `deepspeed.comm`; a context in which `from_pretrained` shards as it reads.
Runs in: train workers of a deepspeed recipe, and nowhere else: importing deepspeed costs seconds and patches torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftcore.backends.base import World
from ftcore.errors import ConfigError

if TYPE_CHECKING:
    from ftcore.backends.deepspeed import DeepSpeed


def start(world: World) -> None:
    """Makes `import deepspeed` and `deepspeed.initialize` safe to call. May be called again."""
    if world.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank)}
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)  # it calls by old names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.comm

        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # one machine's ranks could reduce through shared memory with an op that has to be compiled first: gloo does without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # a single worker: DeepSpeed wants a group all the same
            backend = "gloo" if world.device == "cpu" else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        if dist.get_backend() == "gloo":
            deepspeed.comm.comm.cdb.all_gather_function = gather_in_place


class _Works:
    """Several communications under way, waited for as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> bool:
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def gather_in_place(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> _Works | None:
    """`dist.all_gather_into_tensor`, each rank broadcasting its part into its place.

    gloo's own gathers into a second tensor of the output's size and copies: twice the memory, and 2.5x the time at 32 MiB.
    """
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    parts[dist.get_rank(group)].copy_(input_tensor.view(-1))
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    works = _Works([dist.broadcast(part, src=rank, group=group, async_op=True) for rank, part in zip(ranks, parts, strict=True)])
    if async_op:
        return works
    works.wait()
    return None


@contextmanager
def sharded_loading(backend: DeepSpeed, dtype: torch.dtype) -> Iterator[None]:
    """Under stage 3 every parameter is sharded as soon as it is made, and filled from the files one module at a time."""
    if backend.zero != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    sharding = {"stage": 3, "memory_efficient_linear": False}
    offload = {"offload_param": {"device": "cpu"}} if backend.offload_params != "none" else {}
    keys = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}, "zero_optimization": sharding | offload}
    config = HfDeepSpeedConfig(keys)  # transformers and peft look for it through a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def return_memory() -> None:
    """Asks glibc to give large freed tensors back at once. Gathered weights come and go, and kept free lists grow to the whole model."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none, and other habits
    if mallopt is not None:
        mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD


def save_no_weights(model: nn.Module) -> None:
    """Has linear layers keep the parameter itself for the backward pass.

    torch keeps a transposed view of it, whose memory outlives the release of the gathered weight: by the end of the forward pass every
    rank would hold the whole model. DeepSpeed's own remedy is the same function put in place of torch's for the whole process.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, zero3_linear_wrap, module)


def _linear(function: Callable[..., Tensor], module: nn.Linear, inputs: Tensor) -> Tensor:
    return function(inputs, module.weight, module.bias)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed holds this parameter in shards (its own mark)."""
    return "ds_id" in vars(parameter)


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's true shape, whether it is sharded or not."""
    return tuple(parameter.ds_shape) if is_sharded(parameter) else tuple(parameter.shape)


def own_run(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """(start, numel) of the run of the flattened parameter that `rank` holds; the last ranks' shards are padded beyond it."""
    held, total = parameter.ds_tensor.ds_numel, parameter.ds_numel
    start = min(rank * held, total)
    return start, min(held, total - start)


def gathering(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """A context in which a sharded parameter is whole, on every rank; all ranks enter it together."""
    if not is_sharded(parameter):
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
    return whole


def check_nvme(path: str | None) -> None:
    """Raises ConfigError unless NVMe offload can work here: a folder to write to, and the asynchronous I/O library."""
    if path is None or not Path(path).is_dir() or not os.access(path, os.W_OK):
        raise ConfigError(
            "there is no such folder to offload to", where="backend.nvme_path", got=path, wanted="a folder on a local disk, writable",
            remedy="make it on every node, or offload to cpu",
        )  # fmt: skip
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "NVMe offload needs the asynchronous I/O library, which is not here", where="backend", got="no libaio",
            wanted="libaio with its headers, and a C++ compiler", remedy="install libaio-dev on every node, or offload to cpu",
        )  # fmt: skip
