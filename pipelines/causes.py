"""Causes: of many errors that one failure makes, the one that explains the others, and the words for it.

In: errors by rank, from workers and from Ray Train. Out: the true cause, whether a retry could help, an error for people.
Runs in: the driver and a worker's supervisor.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback  # Ray's wrapper; it offers no public way to the cause

from ftcore.errors import ConfigError, DataError, FtcoreError, IntegrityError, Interrupted, ModelError, StorageError, TrainingError
from ftcore.nursery import WorkerDied

WOULD_HAPPEN_AGAIN = (ConfigError, DataError, ModelError, IntegrityError, TrainingError, Interrupted)
NOT_WORTH_A_RETRY = (errno.ENOSPC, errno.EDQUOT, errno.EACCES)


def would_happen_again(cause: BaseException) -> bool:
    """Whether restarting the workers could only repeat this."""
    return isinstance(cause, WOULD_HAPPEN_AGAIN) or (isinstance(cause, StorageError) and cause.errno in NOT_WORTH_A_RETRY)


def root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """(rank, error) that explains the others: ours first, then a death; peers of a dead worker only lose their connection."""

    def order(pair: tuple[int, BaseException]) -> tuple[int, int]:
        rank, cause = pair
        return (0 if isinstance(cause, FtcoreError) else 1 if is_death(cause) else 3 if is_lost_peer(cause) else 2), rank

    return min(((rank, _unwrapped(error)) for rank, error in failures.items()), key=order)


def is_death(cause: BaseException) -> bool:
    """Whether a process ended without a word."""
    return isinstance(cause, RayActorError | WorkerDied)


def is_lost_peer(cause: BaseException) -> bool:
    """Whether this only says that another worker is gone: gloo and nccl fail when a peer does."""
    return not isinstance(cause, FtcoreError) and not is_death(cause) and "onnection" in str(cause)


def of_ray_train(error: Exception) -> tuple[int, BaseException]:
    """(rank, cause) of what Ray Train raised; rank -1 when no worker failed."""
    if isinstance(error, ray.train.ControllerError):
        return -1, error.controller_failure
    if isinstance(error, ray.train.WorkerGroupError):
        return root_cause(error.worker_failures)
    return -1, error


def _unwrapped(error: BaseException) -> BaseException:
    inner = error._base_exc if isinstance(error, UserExceptionWithTraceback) else getattr(error, "health_check_failure", None)
    return _unwrapped(inner) if isinstance(inner, BaseException) else error


def headline(cause: BaseException) -> str:
    """One line about an error."""
    if isinstance(cause, WorkerDied):
        return "its process died (killed, out of memory, or its node is gone)"
    if isinstance(cause, RayActorError):
        if "creation task" not in str(cause):
            return "its process died (killed, out of memory, or its node is gone)"
        return f"it could not start: {str(cause).strip().splitlines()[-1]}"
    text = cause.what if isinstance(cause, FtcoreError) else str(cause)
    return f"{type(cause).__name__}: {next(iter(text.strip().splitlines()), '')}"


def explained(rank: int, cause: BaseException, got: str, place: object, num_failures: int, logs: str) -> BaseException:
    """The error a person should see for a run that is given up: the cause, not the machinery around it."""
    if isinstance(cause, FtcoreError):
        return cause
    allowed = f"at most {num_failures - 1} (resources.max_failures)" if rank >= 0 and num_failures > 1 else ""
    times = f" for the {num_failures}. time" if num_failures > 1 else ""
    return TrainingError(
        f"a training worker failed{times}" if rank >= 0 else "Ray Train failed",
        where=f"worker {rank}, {place}" if rank >= 0 else "Ray Train",
        got=got, wanted=allowed,
        remedy=f"the workers' logs are in {logs}; what is sealed stays usable: the same command goes on from there",
    )  # fmt: skip
