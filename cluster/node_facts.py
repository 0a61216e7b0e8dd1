"""Node facts: what one machine can say of itself: versions, our code, memory, GPUs, free disk, its clock. Standard library only.

In: folders to look at. Out: NodeFacts. Runs in: every node, and the driver.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ftcore

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "safetensors", "tokenizers")
ROOMS = ("ftcore", "cluster", "pipelines", "serving")
GIB = 2**30


@dataclass(frozen=True)
class NodeFacts:
    """`versions` hold "none" for what is not installed; `free_gib` is by folder; `seconds` the wall clock when it was asked."""

    versions: dict[str, str]
    code: str
    cpus: int
    memory_gib: float
    memory_free_gib: float
    gpus: tuple[str, ...]
    free_gib: dict[str, float]
    seconds: float


def node_facts(folders: Sequence[str] = ()) -> NodeFacts:
    total, free = _memory_gib()
    return NodeFacts(
        versions={"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        code=code_digest(), cpus=_cpus(), memory_gib=total, memory_free_gib=free, gpus=gpus(),
        free_gib={folder: _free_gib(Path(folder)) for folder in folders}, seconds=time.time(),
    )  # fmt: skip


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def code_digest() -> str:
    """SHA-256 over our own sources: names and contents of every .py file of the rooms that lie beside `ftcore`."""
    root, whole = Path(ftcore.__file__).resolve().parent.parent, hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            whole.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> tuple[float, float]:
    """(total, available): the machine's, or what its container may take where that is less; (0, 0) where nothing says."""
    facts = _numbers(Path("/proc/meminfo"), 2**20)
    total, free = facts.get("MemTotal", 0.0), facts.get("MemAvailable", 0.0)
    limit, used = container_gib()
    return min(total, limit), max(0.0, min(free, limit - used))


def container_gib(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """(limit, used without the page cache that can go) of this process's control group, version 2 or 1; (inf, 0) without a limit."""
    for limit, used, folder in (
        ("memory.max", "memory.current", root),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", root / "memory"),
    ):
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()) != "max":
            cache = _numbers(folder / "memory.stat", GIB)
            idle = cache.get("total_inactive_file", cache.get("inactive_file", 0.0))  # version 1 counts the groups below apart
            return int(text) / GIB, max(0.0, int((folder / used).read_text()) / GIB - idle)
    return math.inf, 0.0


def _numbers(file: Path, unit: int) -> dict[str, float]:
    """Lines like `MemTotal:  24 kB` or `inactive_file 24`; {} without the file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {words[0].rstrip(":"): int(words[1]) / unit for words in map(str.split, lines)}


def gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that the driver shows, whatever Ray lets this process use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    done = subprocess.run([tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if done.returncode == 0 else ()


def _free_gib(folder: Path) -> float:
    """Free space where a folder lies or will lie."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free / GIB
