"""Rows: runs the tasks of data preparation, one after the other in this process or spread over the cluster by Ray Data.

In: JSON-able orders. Out: their answers, in order. Runs in: the driver (streams orders and answers, never rows); Ray Data tasks and actors.

Rows and tokens go from task to storage and from storage to task, so neither the driver nor the object store grows with the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data

from cluster.connect import connect
from ftcore import errors
from ftcore.data.tasks import Answer, EncodeRows, Order, find_copies, pack_window
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.storage import Folder


class HereTasks:
    """Every task in this process, in order."""

    def __init__(self, recipe: Recipe, staged: Folder, blocks: Folder) -> None:
        self.recipe, self.staged, self.blocks = recipe, staged, blocks
