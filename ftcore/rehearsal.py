"""Rehearsal: which micro-batch of a run is tried before its first step, so that too little memory shows in the first minute.

In: the order of blocks and their sizes; an error of an allocator. Out: a step; a TrainingError that names the forecast. Runs in: train
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ftcore.data.order import Order
from ftcore.errors import FtcoreError, TrainingError
from ftcore.forecast import Forecast, forecast, pasted
from ftcore.memory import GIB
from ftcore.recipe import Recipe

AS_HEAVY = 1.1
"""A first step whose largest micro-batch is this near to the heaviest one shows as much as a rehearsal would."""
LESS = 0.8
"""Of the forecast, what is proposed to somebody whose worker ran out of memory all the same."""


def heaviest_step(order: Order, sizes: np.ndarray, steps: range, micro_batch: int, *, padded: bool) -> int | None:
    """The one of `steps`, within the epoch they begin in, whose largest micro-batch holds most tokens; None where the first is as heavy.

    `sizes`: tokens of each training block. A window's largest blocks share a micro-batch (order.deal); `padded`, all take the longest's.
    """
    if not steps:
        return None
    epoch, first = divmod(steps.start, order.steps_per_epoch)
    tokens = np.zeros(order.steps_per_epoch * order.batch_size, np.int64)
    tokens[: order.num_blocks] = sizes[Order(order.num_blocks, order.num_blocks, order.seed).window(epoch)]  # one window: the whole epoch
    windows = tokens.reshape(order.steps_per_epoch, order.batch_size)[first : first + len(steps)]
    largest = -np.sort(-windows, axis=1)[:, :micro_batch]
    weights = largest[:, 0] * (largest > 0).sum(axis=1) if padded else largest.sum(axis=1)
    found = int(weights.argmax())
    return steps.start + found if weights[found] > AS_HEAVY * weights[0] else None


@contextmanager
def naming_the_forecast(recipe: Recipe, step: Callable[[], int]) -> Iterator[None]:
    """Raises TrainingError where memory gives out before `step()` has moved: that would only happen again.

    Later on it may be another process that took it, and a restart from the newest checkpoint is worth a try.
    """
    began = step()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if step() != began or not _is_out_of_memory(error):
            raise
        raise _explained(recipe, error) from error


def _is_out_of_memory(error: Exception) -> bool:
    """torch's own kind on a GPU; on a CPU a plain RuntimeError of its allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        not isinstance(error, FtcoreError) and "DefaultCPUAllocator" in str(error)
    )


def _explained(recipe: Recipe, error: Exception) -> TrainingError:
    try:
        known: Forecast | None = forecast(recipe)
    except FtcoreError:
        known = None  # a method or an architecture without one
    found = known.nearest(LESS * known.need.peak) if known else None
    return TrainingError(
        "a worker ran out of memory in its first, heaviest micro-batch",
        got=str(error).strip().split("\n")[0][:200],
        wanted=f"{known.need.peak / GIB:.2f} GiB by the forecast" if known else "more than there is; it has no forecast",
        remedy=pasted(found) if found else "lower backend.micro_batch or data.max_length, or set backend.gradient_checkpointing=true",
    )
