"""Reduce ping: one all-reduce between all nodes, checked and timed, before a training run depends on it.

In: rank, size, where rank 0 listens. Out: Ping. Runs in: one process a node, together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

TIMEOUT_S = 90
SMALL_ROUNDS, LARGE_ROUNDS = 20, 3
LARGE_FLOATS = 2 << 20


@dataclass(frozen=True)
class Ping:
    """`latency_ms` of an all-reduce of one number; `mib_s` of 8 MiB: bytes of the tensor a second, not bytes on the wire."""

    latency_ms: float
    mib_s: float
    backend: str


def reduce_ping(backend: str, host: str, port: int, rank: int, size: int) -> Ping:
    """Raises RuntimeError when ranks do not meet within the timeout, or when the sum is wrong."""
    import torch
    import torch.distributed as dist

    device = "cuda" if backend == "nccl" else "cpu"
    dist.init_process_group(backend, f"tcp://{host}:{port}", timedelta(seconds=TIMEOUT_S), size, rank)
    try:
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        if one.item() != size:
            raise RuntimeError(f"the sum over {size} ranks is {one.item():g}")
        return Ping(
            _seconds(one, SMALL_ROUNDS) * 1000,
            LARGE_FLOATS * 4 / 2**20 / _seconds(torch.ones(LARGE_FLOATS, device=device), LARGE_ROUNDS),
            backend,
        )
    finally:
        dist.destroy_process_group()


def _seconds(tensor: object, rounds: int) -> float:
    """Seconds of one round, after a first that is not counted."""
    import torch
    import torch.distributed as dist

    for number in range(rounds + 1):
        if number == 1:
            began = time.monotonic()
        dist.all_reduce(tensor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.monotonic() - began) / rounds
