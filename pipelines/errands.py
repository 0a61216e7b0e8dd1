"""Errands: small JSON-able orders, carried out over the cluster with Ray Data, streaming, answered in the order they were given.

In: a task (a function, or a class whose objects are called) and its orders. Out: JSON-able answers, or the FtcoreError that a task raised.
Runs in: the driver (orders and answers), Ray Data actors and tasks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray.data

from cluster.connect import Connection
from cluster.runtime_env import following
from ftcore import errors
from ftcore.errors import FtcoreError

Order = dict[str, Any]
Answer = dict[str, Any]
Record = dict[str, Any]


def environment(connection: Connection) -> dict[str, Any]:
    """Options of tasks and actors: a Ray of our own inherits this process's environment; the workers of a cluster do not."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return {"runtime_env": {"env_vars": following()}} if connection.kind in ("cluster", "job") and following() else {}


def by_task(task: Callable[[Order], Answer], orders: Sequence[Order], **options: Any) -> Iterator[Answer]:
    """A function, anywhere."""
    return _answers(_dataset(orders).map(partial(_answer, task), **options))


def by_actors(
    cls: Callable[..., Callable[[Order], Answer]], arguments: tuple[Any, ...], orders: Sequence[Order], **options: Any
) -> Iterator[Answer]:
    """Objects of a class that take long to open: each answers many orders."""
    actor: Any = _Actor
    return _answers(_dataset(orders).map(actor, fn_constructor_args=(cls, *arguments), **options))


class _Actor:
    def __init__(self, cls: Callable[..., Callable[[Order], Answer]], *arguments: Any) -> None:
        self.task = cls(*arguments)

    def __call__(self, record: Record) -> Record:
        return _answer(self.task, record)


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
