"""Launch: runs one function on every worker of a run, on Ray Train or in this process, and brings back its value or the true cause.

In: `work(world, say)`, the recipe's resources. Out: rank 0's return value; what workers said, handed to `hear`. Runs in: the driver (launch), workers (work).

A dead worker restarts all of them (FailureConfig); `work` finds its own way back from what is sealed. Errors that would only happen again
(a wrong recipe, damaged files, a full disk, a loss that is not finite) are not retried. Ctrl-C and SIGTERM stop the workers.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback  # Ray's wrapper; it offers no public way to the cause

from cluster.connect import Connection
from cluster.relay import Relay
from cluster.resources import alive_nodes, check_fits, scaling_numbers
from cluster.runtime_env import worker_variables
from ftcore.backends.base import World
from ftcore.errors import ConfigError, DataError, FtcoreError, IntegrityError, Interrupted, ModelError, StorageError, TrainingError
from ftcore.recipe import Resources

Message = Mapping[str, Any]
Say = Callable[[Message], None]
T = TypeVar("T")

WOULD_HAPPEN_AGAIN = (ConfigError, DataError, ModelError, IntegrityError, TrainingError, Interrupted)
POLL_S = 0.2
GLOO_TIMEOUT_S = 1800


def launch(
    work: Callable[[World, Say], T], resources: Resources, connection: Connection, *, name: str, hear: Callable[[Message], None]
) -> T:
    """Runs `work` on `resources.workers` Ray Train workers; returns what rank 0 returned.

    `hear` is called in this process with every message a worker said, and with `{"event": "failure", ...}` when one failed.
    Raises the worker's own FtcoreError, ClusterError before launching when the cluster is too small, Interrupted on Ctrl-C or SIGTERM.
    """
    check_fits(resources, alive_nodes())
    relay = Relay.open()
    ear = _Ear(relay, hear)
    with tempfile.TemporaryDirectory(prefix="ftcore-train-") as scratch:  # Ray Train's own notes; our state lives in the run folder
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config={"work": work, "relay": relay, "cwd": os.getcwd()},
            scaling_config=ray.train.ScalingConfig(**scaling_numbers(resources)),
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo", timeout_s=GLOO_TIMEOUT_S),
            run_config=ray.train.RunConfig(
                name=name, storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
                callbacks=[_Failures(relay)], worker_runtime_env={"env_vars": worker_variables(resources)},
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            with ear, _stoppable():
                return trainer.fit().return_value
        except (ray.train.TrainingFailedError, RayActorError) as error:
            raise _explained(error, ear, connection) from error
        finally:
            relay.close()


def launch_here(work: Callable[[World, Say], T], *, hear: Callable[[Message], None]) -> T:
    """Runs `work` in this process as the only worker, without Ray."""
    with _stoppable():
        return work(World(device="cpu", node="here"), hear)


def _on_worker(order: dict[str, Any]) -> Any:
    """What every Ray Train worker runs: finds its place among the others, then works."""
    if os.path.isdir(order["cwd"]):  # noqa: PTH112
        os.chdir(order["cwd"])
    context = ray.train.get_context()
    relay: Relay = order["relay"]
    device = str(ray.train.torch.get_device())
    node = ray.util.get_node_ip_address()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device, node)
    relay.push({"event": "worker", "rank": world.rank, "size": world.size, "node": node, "pid": os.getpid()})
    return order["work"](world, relay.push)


class _Failures(ray.train.UserCallback):
    """Runs in Ray Train's controller. Tells the driver who failed and why, and ends the run at once when a retry is pointless."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        rank, cause = root_cause(worker_exceptions)
        final = would_happen_again(cause)
        self.relay.push({"event": "failure", "rank": rank, "cause": _headline(cause), "final": final})
        if final:
            raise cause  # the controller does not retry an error of a callback, and carries it to the driver


def would_happen_again(cause: BaseException) -> bool:
    """Whether restarting the workers could only repeat this."""
    return isinstance(cause, WOULD_HAPPEN_AGAIN) or (isinstance(cause, StorageError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES))


def root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The failure that explains the others: our own errors first, then a death, then whatever else (peers of a dead worker lose their connection)."""

    def rank_of_interest(pair: tuple[int, BaseException]) -> tuple[int, int]:
        cause = pair[1]
        order = 0 if isinstance(cause, FtcoreError) else 1 if isinstance(cause, RayActorError) else 3 if "onnection" in str(cause) else 2
        return order, pair[0]

    return min(((rank, _unwrapped(error)) for rank, error in failures.items()), key=rank_of_interest)


def _unwrapped(error: BaseException) -> BaseException:
    while True:
        inner = error._base_exc if isinstance(error, UserExceptionWithTraceback) else getattr(error, "health_check_failure", None)
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _headline(cause: BaseException) -> str:
    if isinstance(cause, RayActorError):
        return "its process died"
    text = cause.what if isinstance(cause, FtcoreError) else str(cause)
    return f"{type(cause).__name__}: {next(iter(text.strip().splitlines()), '')}"


def _explained(error: Exception, ear: _Ear, connection: Connection) -> Exception:
    """The error a person should see for a run that Ray Train gave up."""
    if isinstance(error, ray.train.ControllerError):
        cause: BaseException = error.controller_failure
        rank = -1
    elif isinstance(error, ray.train.WorkerGroupError):
        rank, cause = root_cause(error.worker_failures)
    else:
        rank, cause = -1, error
    if isinstance(cause, FtcoreError):
        return cause
    where = f"worker {rank}, {ear.workers[rank]}" if rank in ear.workers else "Ray Train's controller" if rank < 0 else f"worker {rank}"
    return TrainingError(
        "a training worker failed and no retry is left" if rank >= 0 else "Ray Train failed", where=where, got=_headline(cause),
        wanted="" if ear.num_failures <= 1 else f"no more failures than resources.max_failures ({ear.num_failures} happened)",
        remedy=f"what is sealed stays usable: the same command continues there; the workers' logs are in {connection.logs}",
    )


class _Ear:
    """A thread that hears what workers say while the main thread waits for them."""

    def __init__(self, relay: Relay, hear: Callable[[Message], None]) -> None:
        self.relay, self.hear = relay, hear
        self.workers: dict[int, str] = {}
        self.num_failures = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="relay", daemon=True)

    def __enter__(self) -> _Ear:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if sys.exc_info()[0] in (None, ray.train.ControllerError, ray.train.WorkerGroupError):
            self._drain()

    def _listen(self) -> None:
        while not self._over.wait(POLL_S):
            self._drain()

    def _drain(self) -> None:
        try:
            messages = self.relay.drain()
        except ray.exceptions.RayError:
            return  # the cluster is going away; the main thread knows why
        for message in messages:
            if message.get("event") == "worker":
                self.workers[message["rank"]] = f"pid {message['pid']} on {message['node']}"
            elif message.get("event") == "failure":
                self.num_failures += 1
            self.hear(message)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into Interrupted once the workers are stopped. Ray Train's own handler for SIGINT stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopped = threading.Event()

    def terminate(number: int, frame: object) -> None:
        stopped.set()
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        name = "SIGTERM" if stopped.is_set() else "Ctrl-C"
        raise Interrupted("the run was stopped", got=name) from error
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
