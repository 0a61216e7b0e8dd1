"""Processes that write to S3 and are killed at every single request: what is left must be the old state or the new one.

Workers are forked from a server that has the heavy imports already.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import Card
from ftcore.data.prepared import PreparedWriter, write_shard
from ftcore.data.types import Block
from ftcore.rundir import RunDir, checkpoint_key
from ftcore.storage import Folder
from tests.s3_faults import FaultyProxy, Request, at
from tests.worlds import FORKSERVER

DIGEST, FACTS = "d" * 64, {"counts": {"rows": {"train": 3}}}
MOST_REQUESTS = 100


def _work(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    tempfile.tempdir = str(Path(environment["FTCORE_CACHE"]).parent)  # what is killed leaves its local copy: in the test's own folder
    work(*arguments)


def _process(work: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "FTCORE_"))}
    return FORKSERVER.Process(target=_work, args=(environment, work, arguments))


def at_once(work: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Runs `work` in as many processes as there are calls; returns their exit codes."""
    processes = [_process(work, arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def killed_at_every_request(
    proxy: FaultyProxy, work: Callable[..., None], arguments: tuple[Any, ...], look: Callable[[int], None], every: int = 1
) -> int:
    """Runs `work(*arguments)` in processes of its own, each killed as its k-th request arrives (it is still handled for odd k, and lost for
    even ones); then `look(k)`. Returns the k of the first that finished. `every` > 1 leaves out some k."""
    for k in range(0, MOST_REQUESTS, every):
        process = _process(work, arguments)
        pid: list[int] = []
        born = threading.Event()

        def kill(request: Request, k: int = k, pid: list[int] = pid, born: threading.Event = born) -> None:
            if request.number == k:
                born.wait(60)
                os.kill(pid[0], signal.SIGKILL)

        proxy.restart(at("cut" if k % 2 else "lost", k))
        proxy.watch = kill
        process.start()
        pid.append(process.pid)
        born.set()
        process.join(600)
        proxy.watch = None
        proxy.restart()
        if process.exitcode == 0:
            return k
        assert process.exitcode == -signal.SIGKILL, f"request {k}: exit code {process.exitcode}"
        look(k)
    raise AssertionError(f"it did not finish within {MOST_REQUESTS} requests")


def save(run: RunDir, step: int, files: dict[str, bytes]) -> None:
    """Seals a checkpoint of these files."""
    with run.sealing(checkpoint_key(step), {"step": step}) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def load(run: RunDir, step: int) -> dict[str, bytes]:
    with run.opened(checkpoint_key(step)) as folder:
        return {name: (folder / name).read_bytes() for name in Folder(folder).files() if name != "manifest.json"}


def publish(store: str, folder: Path, card: Card) -> None:
    AdapterStore(store).publish(folder, card)


def publish_and_promote(store: str, folder: Path, card: Card) -> None:
    publish(store, folder, card)
    AdapterStore(store).promote(AdapterRef(card.tenant, card.name, card.digest))


def blocks(count: int) -> list[Block]:
    one = np.arange(8, dtype=np.int32)
    return [Block(one, np.ones(8, np.uint8), np.array([8], np.int32), np.array([index])) for index in range(count)]


def build(cache: Folder, token: str) -> PreparedWriter:
    """A build of prepared blocks, not sealed yet."""
    writer = PreparedWriter(cache, DIGEST, cache / f".building-{DIGEST[:12]}-{token}")
    writer.add("train", *write_shard(writer.folder, writer.key("train", 0), blocks(3), 8))
    return writer


def prepare(cache: str, token: str) -> None:
    build(Folder(cache), token).seal(FACTS)
