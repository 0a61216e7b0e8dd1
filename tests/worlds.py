"""Runs a function in N gloo processes without Ray; processes are forked from a server that has the heavy imports already."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

FORKSERVER = mp.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["ftcore.lean_imports", "ftcore.loop", "ftcore.zero_runtime", "ftcore.s3", "transformers.models.qwen2.modeling_qwen2"]
)
"""A process has one such server, and who sets this last sets it for all: nobody else does."""


def _entry(function: Callable[..., Any], rank: int, size: int, store: str, arguments: tuple[Any, ...], results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=900))
    try:
        results.put((rank, function(rank, size, *arguments)))
    finally:
        dist.destroy_process_group()


def in_world(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(rank, size, *arguments) for each rank], in processes of one gloo group. `function` is a module-level function."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        results = FORKSERVER.SimpleQueue()
        common = (str(Path(folder) / "store"), arguments, results)
        processes = [FORKSERVER.Process(target=_entry, args=(function, rank, size, *common)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(1800)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * size, f"exit codes {codes}"
        found = dict(results.get() for _ in range(size))
    return [found[rank] for rank in range(size)]
