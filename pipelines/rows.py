"""Rows: runs the tasks of data preparation over the cluster with Ray Data, streaming, in the order they were given.

In: JSON-able orders. Out: their answers, in order. Runs in: the driver (orders and answers), Ray Data actors and tasks (rows, tokens).

Rows and tokens go from storage to a task and from a task to storage, so neither the driver nor the object store grows with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import ray
import ray.data

from cluster.connect import connect
from ftcore.data.encode_rows import EncodeRows
from ftcore.data.tasks import Answer, Order, find_copies, pack_window
from ftcore.recipe import dump_recipe
from pipelines.build import Work
from pipelines.errands import by_actors, by_task, environment


class OnRay:
    """The tasks of one preparation on the cluster this process is joined to (or joins, or starts, now)."""

    def __init__(self, work: Work, log: Callable[[str], None]) -> None:
        self.work = work
        connection = connect(log=log)
        if connection.nodes > 1 and work.staged.is_local:
            log(f"data.cache must be a folder that all {connection.nodes} nodes share, or a remote path: {work.staged.path.parents[1]}")
        self.options = environment(connection)

    def encode(self, orders: Sequence[Order]) -> Iterator[Answer]:
        """In actors: opening a tokenizer takes longer than many a piece."""
        recipe = self.work.recipe
        most = max(1, min(len(orders), int(ray.cluster_resources().get("CPU", 1))))
        arguments = (dump_recipe(recipe), recipe.plugins, self.work.staged.url)
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
        return by_actors(EncodeRows, arguments, orders, compute=pool, num_cpus=1, **self.options)

    def find_copies(self, orders: Sequence[Order]) -> Iterator[Answer]:
        if not orders:
            return iter(())  # copies are kept: nothing to look for
        return by_task(partial(find_copies, self.work.staged), orders, num_cpus=1, **self.options)

    def pack(self, orders: Sequence[Order]) -> Iterator[Answer]:
        task = partial(pack_window, self.work.recipe, self.work.staged, self.work.blocks)
        return by_task(task, orders, num_cpus=1, **self.options)
