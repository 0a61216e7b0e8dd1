"""Launch: runs one function on every worker of a run, on Ray Train or in this process, and brings back its value or the true cause.

In: `work(post)`, the recipe's resources. Out: rank 0's return value; what workers said, handed to `hear`. Runs in: the driver (launch),
workers (work).

A dead worker restarts all of them (FailureConfig); `work` finds its own way back from what is sealed. Errors that would only happen again
(a wrong recipe, damaged files, a full disk, a loss that is not finite) are not retried. Ctrl-C and SIGTERM ask `work` to stop; asked
twice, it is left at once.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray
import ray.train.torch
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback  # Ray's wrapper; it offers no public way to the cause

from cluster.connect import Connection
from cluster.relay import Message, Relay
from cluster.resources import alive_nodes, check_fits, scaling_numbers
from cluster.room import Patience, wait_for_room
from cluster.runtime_env import worker_variables
from cluster.worker_logs import WorkerPlace, laid_out, place_of, why_it_died
from ftcore.backends.base import World
from ftcore.errors import ConfigError, DataError, FtcoreError, IntegrityError, Interrupted, ModelError, StorageError, TrainingError
from ftcore.recipe import Resources

T = TypeVar("T")
Hear = Callable[[Message], None]

WOULD_HAPPEN_AGAIN = (ConfigError, DataError, ModelError, IntegrityError, TrainingError, Interrupted)
NOT_WORTH_A_RETRY = (errno.ENOSPC, errno.EDQUOT, errno.EACCES)
POLL_S = 0.2
GROUP_TIMEOUT_S = 1800
DIED = "its process died (killed, out of memory, or its node is gone)"
RunConfig: Any = ray.train.RunConfig  # the signature that mypy reads is Ray Train v1's
UserCallback: Any = ray.train.UserCallback


@dataclass(frozen=True)
class Post:
    """A worker's place in the run: who it is among the others, how it speaks to the driver, and whether the driver wants it to stop."""

    world: World
    say: Callable[[Message], None]
    should_stop: Callable[[], bool]


def launch(work: Callable[[Post], T], resources: Resources, connection: Connection, *, name: str, hear: Hear) -> T:
    """Runs `work` on `resources.workers` Ray Train workers; returns what rank 0 returned.

    `hear` is called in this process with every message a worker said, and with `{"event": "failure", ...}` when one failed.
    Raises the worker's own FtcoreError, ClusterError before launching when the cluster is too small, Interrupted on Ctrl-C or SIGTERM.
    """
    check_fits(resources, alive_nodes())
    wait_for_room(resources, lambda text: hear({"event": "note", "text": text}))
    relay = Relay.open()
    watch = _Watch(relay, hear, resources)
    # Ray Train's own notes go to a scratch folder: our state is in the run folder
    with tempfile.TemporaryDirectory(prefix="ftcore-train-", ignore_cleanup_errors=True) as scratch:
        trainer: Any = ray.train.torch.TorchTrainer(
            _on_worker,
            train_loop_config={"work": work, "relay": relay, "cwd": str(Path.cwd())},
            scaling_config=ray.train.ScalingConfig(**scaling_numbers(resources)),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo", timeout_s=GROUP_TIMEOUT_S),
            run_config=RunConfig(
                name=name, storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
                callbacks=[_Failures(relay)], worker_runtime_env={"env_vars": worker_variables(resources)},
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )  # fmt: skip
        try:
            return watch.over(lambda: trainer.fit().return_value)
        except (ray.train.TrainingFailedError, RayActorError) as error:
            raise _explained(error, watch, connection) from error
        finally:
            relay.close()


def launch_here(work: Callable[[Post], T], *, hear: Hear) -> T:
    """Runs `work` in this process as the only worker, without Ray."""
    asked = threading.Event()
    with on_stop_signal(asked.set):
        return work(Post(World(node="here"), hear, asked.is_set))


def _on_worker(order: dict[str, Any]) -> Any:
    """What every Ray Train worker runs: finds its place among the others, then works."""
    if Path(order["cwd"]).is_dir():
        os.chdir(order["cwd"])  # so that the recipe's relative paths mean what they mean to the driver
    context, relay = ray.train.get_context(), order["relay"]
    device, node = str(ray.train.torch.get_device()), ray.util.get_node_ip_address()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device, node)
    node_id = ray.get_runtime_context().get_node_id()
    relay.push({"event": "worker", "rank": world.rank, "size": world.size, "node": world.node, "node_id": node_id, "pid": os.getpid()})
    should_stop = relay.watch_for_stop() if world.is_main else _never
    return order["work"](Post(world, relay.push, should_stop))


def _never() -> bool:
    return False


class _Failures(UserCallback):
    """Runs in Ray Train's controller. Tells the driver who failed and why, and ends the run at once when a retry is pointless."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        rank, cause = root_cause(worker_exceptions)
        final = would_happen_again(cause)
        self.relay.push({"event": "failure", "rank": rank, "cause": headline(cause), "told": str(cause)[:4000], "final": final})
        if final:
            raise cause  # the controller does not retry an error of a callback, and carries it to the driver


def would_happen_again(cause: BaseException) -> bool:
    """Whether restarting the workers could only repeat this."""
    return isinstance(cause, WOULD_HAPPEN_AGAIN) or (isinstance(cause, StorageError) and cause.errno in NOT_WORTH_A_RETRY)


def root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """(rank, error) that explains the others: ours first, then a death; peers of a dead worker only lose their connection."""

    def order(pair: tuple[int, BaseException]) -> tuple[int, int]:
        rank, cause = pair
        lost = "onnection" in str(cause)
        return (0 if isinstance(cause, FtcoreError) else 1 if isinstance(cause, RayActorError) else 3 if lost else 2), rank

    return min(((rank, _unwrapped(error)) for rank, error in failures.items()), key=order)


def _unwrapped(error: BaseException) -> BaseException:
    inner = error._base_exc if isinstance(error, UserExceptionWithTraceback) else getattr(error, "health_check_failure", None)
    return _unwrapped(inner) if isinstance(inner, BaseException) else error


def headline(cause: BaseException) -> str:
    """One line about an error."""
    if isinstance(cause, RayActorError):
        if "creation task" not in str(cause):
            return DIED
        return f"it could not start: {str(cause).strip().splitlines()[-1]}"
    text = cause.what if isinstance(cause, FtcoreError) else str(cause)
    return f"{type(cause).__name__}: {next(iter(text.strip().splitlines()), '')}"


def _explained(error: Exception, watch: _Watch, connection: Connection) -> Exception:
    """The error a person should see for a run that Ray Train gave up: the cause, not the machinery around it."""
    rank, cause = -1, error
    if isinstance(error, ray.train.ControllerError):
        cause = error.controller_failure
    elif isinstance(error, ray.train.WorkerGroupError):
        rank, cause = root_cause(error.worker_failures)  # type: ignore[assignment]
    if isinstance(cause, FtcoreError):
        return cause
    allowed = f"at most {watch.num_failures - 1} (resources.max_failures)" if rank >= 0 and watch.num_failures > 1 else ""
    times = f" for the {watch.num_failures}. time" if watch.num_failures > 1 else ""
    return TrainingError(
        f"a training worker failed{times}" if rank >= 0 else "Ray Train failed",
        where=f"worker {rank}, {watch.workers.get(rank, 'place unknown')}" if rank >= 0 else "Ray Train",
        got=watch.deaths.get(rank) or headline(cause), wanted=allowed,
        remedy=f"the workers' logs are in {connection.logs}; what is sealed stays usable: the same command goes on from there",
    )  # fmt: skip


class _Watch:
    """Waits for a run in the main thread: hears what its workers say and passes on the wish to stop."""

    def __init__(self, relay: Relay, hear: Hear, asked: Resources) -> None:
        self.relay, self.hear = relay, hear
        self.workers: dict[int, WorkerPlace] = {}
        self.present: dict[int, WorkerPlace] = {}
        self.deaths: dict[int, str] = {}
        self.num_failures = 0
        self.patience = Patience(asked, lambda text: hear({"event": "note", "text": text}))

    def over(self, run: Callable[[], T]) -> T:
        """`run` in a thread of its own: Ray Train takes Ctrl-C for itself in the main thread, and would kill without a checkpoint."""
        value: list[T] = []
        error: list[BaseException] = []

        def guarded() -> None:
            try:
                value.append(run())
            except BaseException as raised:  # carried to the waiting thread
                error.append(raised)

        thread = threading.Thread(target=guarded, name="ray-train", daemon=True)
        with on_stop_signal(self._stop):
            thread.start()
            while thread.is_alive():
                thread.join(POLL_S)
                self._drain()
                self.patience.check()
        if error:
            raise error[0]
        return value[0]

    def _stop(self) -> None:
        self.relay.ask_to_stop()
        self.hear({"event": "stopping"})

    def _drain(self) -> None:
        try:
            messages = self.relay.drain()
        except RayError:
            return  # the cluster is going away; the run's own error says why
        for message in messages:
            self.hear(self._noted(message))

    def _noted(self, message: Message) -> Message:
        if message["event"] == "worker":
            self.workers[message["rank"]] = self.present[message["rank"]] = place_of(message)
            if len(self.present) == message["size"]:
                self.patience.running()
                self.hear({"event": "note", "text": laid_out(self.present)})
        elif message["event"] == "failure":
            self.num_failures += 1
            self.patience.failed()
            if message["cause"] == DIED:
                cause = self.deaths[message["rank"]] = why_it_died(self.workers.get(message["rank"]), message["told"])
                message = {**message, "cause": cause}
            self.present = {}
        return message


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM calls `stop` once; the second time it is a KeyboardInterrupt. Outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        stop()

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
