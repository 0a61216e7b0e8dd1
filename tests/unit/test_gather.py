"""The all-gather that ZeRO uses over gloo: what torch's own gathers, in place, also for a group that is not the world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ftcore.zero_runtime import gather_in_place
from tests.worlds import in_world


def gathered(rank: int, size: int) -> list[Any]:
    found = []
    last_two = dist.new_group([size - 2, size - 1])
    for group in (None, last_two):
        if group is not None and rank < size - 2:
            continue
        members = dist.get_world_size(group)
        for dtype in (torch.float32, torch.bfloat16):
            part = torch.arange(5).add(10 * rank).to(dtype)
            ours, theirs = torch.zeros(5 * members, dtype=dtype), torch.zeros(5 * members, dtype=dtype)
            work = gather_in_place(ours, part, group=group, async_op=True)
            assert work is not None
            work.wait()
            dist.all_gather_into_tensor(theirs, part, group=group)
            found.append((ours.tolist(), theirs.tolist(), part.tolist()))
            ours.zero_()
            ours[5 * dist.get_rank(group) :][:5] = part  # DeepSpeed hands over its own place in the output
            assert gather_in_place(ours, ours[5 * dist.get_rank(group) :][:5], group=group) is None
            assert torch.equal(ours, theirs)
    return found


def test_it_gathers_what_torch_gathers() -> None:
    world = in_world(3, gathered)
    assert [len(found) for found in world] == [2, 4, 4]
    for found in world:
        for ours, theirs, part in found:
            assert ours == theirs
            assert any(ours[at : at + 5] == part for at in range(0, len(ours), 5))
