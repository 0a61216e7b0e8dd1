"""Rows: runs the tasks of data preparation over the cluster with Ray Data, streaming, in the order they were given.

In: JSON-able orders. Out: their answers, in order. Runs in: the driver (orders and answers), Ray Data actors and tasks (rows, tokens).

Rows and tokens go from storage to a task and from a task to storage, so neither the driver nor the object store grows with the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.data

from cluster.connect import connect
from cluster.runtime_env import following
from ftcore import errors
from ftcore.data.encode_rows import EncodeRows
from ftcore.data.tasks import Answer, Order, find_copies, pack_window
from ftcore.errors import FtcoreError
from ftcore.recipe import dump_recipe
from pipelines.build import Work

Record = dict[str, Any]


class OnRay:
    """The tasks of one preparation on the cluster this process is joined to (or joins, or starts, now)."""

    def __init__(self, work: Work, log: Callable[[str], None]) -> None:
        self.work = work
        connection = connect(log=log)
        if connection.nodes > 1 and work.staged.is_local:
            log(f"data.cache must be a folder that all {connection.nodes} nodes share, or a remote path: {work.staged.path.parents[1]}")
        # a Ray of our own inherits this process's environment; the workers of a cluster do not
        self.options: dict[str, Any] = (
            {"runtime_env": {"env_vars": following()}} if connection.kind in ("cluster", "job") and following() else {}
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def encode(self, orders: Sequence[Order]) -> Iterator[Answer]:
        """In actors: opening a tokenizer takes longer than many a piece."""
        recipe = self.work.recipe
        most = max(1, min(len(orders), int(ray.cluster_resources().get("CPU", 1))))
        arguments = (dump_recipe(recipe), recipe.plugins, self.work.staged.url)
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
        encoder: Any = _Encoder
        return _answers(_dataset(orders).map(encoder, fn_constructor_args=arguments, compute=pool, num_cpus=1, **self.options))

    def find_copies(self, orders: Sequence[Order]) -> Iterator[Answer]:
        if not orders:
            return iter(())  # copies are kept: nothing to look for
        task = partial(find_copies, self.work.staged)
        return _answers(_dataset(orders).map(partial(_answer, task), num_cpus=1, **self.options))

    def pack(self, orders: Sequence[Order]) -> Iterator[Answer]:
        task = partial(pack_window, self.work.recipe, self.work.staged, self.work.blocks)
        return _answers(_dataset(orders).map(partial(_answer, task), num_cpus=1, **self.options))


class _Encoder:
    def __init__(self, recipe_text: str, plugins: tuple[str, ...], staged: str) -> None:
        self.encode = EncodeRows(recipe_text, plugins, staged)

    def __call__(self, record: Record) -> Record:
        return _answer(self.encode, record)


def _dataset(orders: Sequence[Order]) -> ray.data.Dataset:
    records = [{"number": number, "order": json.dumps(order)} for number, order in enumerate(orders)]
    return ray.data.from_items(records, override_num_blocks=len(records))


def _answer(task: Callable[[Order], Answer], record: Record) -> Record:
    """A deliberate error travels as an answer: as an exception Ray would wrap it and its facts would be lost."""
    try:
        answer = task(json.loads(record["order"]))
    except FtcoreError as error:
        known = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        answer = {"error": known, "what": error.what, **error.facts()}
    return {"number": record["number"], "answer": json.dumps(answer)}


def _answers(dataset: ray.data.Dataset) -> Iterator[Answer]:
    for record in dataset.iter_rows():
        answer = json.loads(record["answer"])
        if "error" in answer:
            raise getattr(errors, answer.pop("error"))(answer.pop("what"), **answer)
        yield answer
