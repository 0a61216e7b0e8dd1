"""Runtime environment: what travels to the cluster with a run, and the variables a training worker starts with.

In: a recipe's resources. Out: Ray runtime_env dictionaries. Runs in: the driver; imports no ray.

What `ray job submit --working-dir .` leaves at home is written in one place, the `.rayignore` beside pyproject.toml: Ray reads it (and
.gitignore) for every upload, from the shell as well as from Python.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import ftcore
from ftcore.recipe import Resources

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, nowhere else."""

FOLLOWING = (
    "FTCORE_PLUGINS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_REGION", "AWS_DEFAULT_REGION", "FTCORE_STORAGE_PATIENCE_S",
    "FTCORE_PREEMPTION_FILE", "FTCORE_PREEMPTION_URL",
)  # fmt: skip
"""Variables a worker needs to see as the driver does. No credentials: those come by each machine's own chain, never in a job's metadata."""

MALLOC = {
    # glibc gives large tensors back to the kernel after every step otherwise; keeping them made a CPU step 1.3x to 2.5x faster.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",  # Ray Train steps in a second thread; the settings above only help the main arena
}


def inside_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return JOB_VARIABLE in os.environ


def joins_cluster() -> bool:
    """Whether a run of this process belongs on a cluster that is there already (see cluster.connect), not on a Ray of our own."""
    return inside_job() or os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def checkout() -> Path | None:
    """The folder of our sources when they are not installed: then they must travel with the run. None for an installed package."""
    root = Path(ftcore.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def code_for_cluster() -> dict[str, Any]:
    """The runtime_env with which a driver joins a running cluster: a checkout goes with it, so that all nodes run the driver's code."""
    root = None if inside_job() else checkout()
    return {"working_dir": str(root)} if root else {}


def code_for_here() -> None:
    """Before a Ray is started on this machine: its processes inherit the environment, so PYTHONPATH brings them to the same sources."""
    root, path = checkout(), os.environ.get("PYTHONPATH", "")
    if root and str(root) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [path])])


def compute_threads(resources: Resources) -> int:
    """Threads one worker computes with: its whole CPUs, at least one."""
    return max(1, int(resources.cpus_per_worker))


def following() -> dict[str, str]:
    """What of this process's environment goes to its workers."""
    return {name: os.environ[name] for name in FOLLOWING if name in os.environ}


def worker_variables(resources: Resources) -> dict[str, str]:
    """The environment of a training worker, complete before its first import."""
    threads = str(compute_threads(resources))
    variables = following()
    variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not resources.gpus_per_worker:
        variables["DS_ACCELERATOR"] = "cpu"  # what deepspeed would find out loudly; transformers imports it wherever it is installed
        variables |= {name: os.environ.get(name, value) for name, value in MALLOC.items()}
    return variables


def keep_memory() -> None:
    """The same for a process that runs already: asks glibc to keep freed memory. Nothing happens where the C library is another one."""
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, name in ((-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_"), (-2, "MALLOC_TOP_PAD_")):  # M_* of malloc.h
            mallopt(option, min(int(MALLOC[name]), (1 << 31) - 1))
