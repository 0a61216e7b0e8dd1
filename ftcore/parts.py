"""Parts: a folder that one job fills with Parquet files, part by part, and goes on with after a stop.

In: the facts that make two jobs the same one, tables. Out: objects in the folder. Runs in: the driver, workers.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftcore.errors import ConfigError
from ftcore.storage import Folder


def claim(folder: Folder, key: str, facts: dict[str, Any], what: str) -> None:
    """Writes the facts of a job, once. Raises ConfigError where those of another one are there, or one has a fact that the other lacks."""
    if folder.create(key, json.dumps(facts, indent=1).encode()):
        return
    held = folder.read_json(key)
    apart = sorted(name for name in {*facts, *held} if held.get(name) != facts.get(name))
    if apart:
        raise ConfigError(
            what, where=folder, got=", ".join(f"other {name}" for name in apart), remedy="give another --out, or the same rows and options"
        )


def write_table(folder: Folder, key: str, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file)
    folder.write(key, file.getvalue())


def read_table(folder: Folder, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(folder.read(key)))
