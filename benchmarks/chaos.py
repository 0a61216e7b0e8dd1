"""Kills a run again and again at seeded moments, and compares what it comes to with a run that was left alone.

    python benchmarks/chaos.py --kills 20 --seed 0 [--method lora|qlora|full] [--backend plain|deepspeed] [--where worker,node,driver,...]

A cluster of a head and three nodes of one CPU each is started on this machine; `pipelines/sft.py` trains a tiny model on two workers.
One line a kill: its number, what was killed, after which step, the seconds until the next step was made, and until the run was further
than it had been. Then `N kills: N finished / N identical`: the run went on after the kill, and its losses until the next one (and the
final weights) are bit for bit those of the run that was left alone (`--tolerance` for a backend that is not exact).

worker: SIGKILL to one training process. seat: SIGKILL to the Ray Train worker above it. node: a whole node, and a new one. driver: SIGKILL
to the command, then the same command. checkpoint: SIGKILL to all training processes as the folder of a half-written checkpoint appears.
upload: the same while a checkpoint goes to s3, with the stand-in for S3 that the tests have. With `--where lose,gain,drain` (in that order)
there are two nodes and workers {min: 1, max: 2}: a node is killed for good, a new one comes, one is drained (and one comes for it).
"""

# ruff: noqa: E402 (the checkout is put on the path first, for this process and those it starts)
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
# Ray gives its workers the least priority; on a machine that others use too, the seconds below would be theirs
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import itertools

import yaml

from tests.conftest import make_tiny_model

KINDS = ("worker", "seat", "node", "driver", "checkpoint", "upload")
ELASTIC = ("lose", "gain", "drain")
"""Not in the default: they change the number of workers, so losses differ in the last digits (give --tolerance)."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "qlora": {"kind": "qlora", "rank": 4, "dropout": 0.1}, "full": {"kind": "full"},
}  # fmt: skip
BACKENDS: dict[str, dict[str, Any]] = {"plain": {"kind": "plain"}, "deepspeed": {"kind": "deepspeed", "zero": 3}}
WORDS = ["open", "close", "file", "report", "folder", "move", "rename", "archive", "quick", "fox", "jumps", "name", "answer", "question"]
EVERY = 5
"""Steps between checkpoints."""
GIVE_UP_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--backend", choices=BACKENDS, default="plain")
    parser.add_argument("--where", default=",".join(KINDS))
    parser.add_argument("--steps-between", type=int, default=20, help="a kill falls at a random step of each such stretch")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference of a loss that counts as identical")
    options = parser.parse_args()
    kinds = options.where.split(",")
    if "upload" in kinds:
        print("upload: skipped, because this checkout has no stand-in for S3 to upload to (tests/s3_server.py)")
        kinds.remove("upload")
    folder = Path(tempfile.mkdtemp(prefix="ftcore-chaos-"))
    began = time.monotonic()
    arena = Arena(folder, recipe_in(folder, options))
    try:
        arena.start()
        ok = compare(arena, plan(kinds, options), options)
    finally:
        arena.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.monotonic() - began:.0f} s in all; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0 if ok else 1


@dataclass
class Kill:
    """One planned kill, and what came of it."""

    kind: str
    step: int
    delay_s: float
    killed_at: float = 0.0
    seen: int = 0
    """The last step in the journal as the kill fell."""
    next_s: float = float("nan")
    further_s: float = float("nan")


def plan(kinds: list[str], options: argparse.Namespace) -> list[Kill]:
    """Every kind about as often as the others, in a seeded order, at seeded moments."""
    draw = random.Random(options.seed)
    chosen = [kinds[i % len(kinds)] for i in range(options.kills)]
    if not set(kinds) & set(ELASTIC):
        draw.shuffle(chosen)
    gap = options.steps_between
    return [Kill(kind, (i + 1) * gap + draw.randrange(gap), draw.random() * 0.3) for i, kind in enumerate(chosen)]


def recipe_in(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(200):
            question, answer = f"{index} {' '.join(draw.choices(WORDS, k=6))}", " ".join(draw.choices(WORDS, k=8))
            file.write(json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n")
    return {
        "name": "chaos", "model": {"path": str(make_tiny_model(folder / "base")), "dtype": "fp32"}, "stage": "sft",
        "data": {"sources": [str(folder / "rows.jsonl")], "max_length": 64, "validation": 0, "cache": str(folder / "prepared")},
        "method": METHODS[options.method], "backend": BACKENDS[options.backend],
        "resources": {"workers": {"min": 1, "max": 2} if "lose" in options.where else 2, "max_failures": -1},
        "optim": {"batch_size": 4, "lr": 1e-3, "max_steps": options.steps_between * (options.kills + 2), "epochs": 1},
        "output": {"runs": str(folder / "runs"), "store": str(folder / "store"), "checkpoint_every": EVERY},
    }  # fmt: skip


@dataclass
class Arena:
    """The cluster, the command that trains on it, and the ways to kill parts of them."""

    folder: Path
    recipe: dict[str, Any]
    nodes: list[Any] = field(default_factory=list)
    cluster: Any = None
    driver: subprocess.Popen[bytes] | None = None
    log: Any = None

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self.log = (self.folder / "driver.log").open("ab")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3 if self.recipe["resources"]["workers"] == 2 else 2):
            self.nodes.append(self.cluster.add_node(num_cpus=1))

    def command(self, name: str) -> None:
        """`python pipelines/sft.py`, as a person would type it."""
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        words = [sys.executable, str(ROOT / "pipelines/sft.py"), "recipe.yaml", f"name={name}"]
        variables = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        self.driver = subprocess.Popen(words, cwd=self.folder, env=variables, stdout=self.log, stderr=subprocess.STDOUT)

    def kill(self, kind: str) -> None:
        assert self.driver is not None
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.command("chaos")
        elif kind == "node":
            busy = {parent_of(pid) for pid in self.seats()}
            victim = next(node for node in self.nodes if raylet_of(node) in busy)
            self.nodes.remove(victim)
            self.cluster.remove_node(victim, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        elif kind == "lose":
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        elif kind == "gain":
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        elif kind == "drain":
            words = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address]
            words += ["--node-id", self.nodes[-1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
            subprocess.run([*words, "--deadline-remaining-seconds", "120"], check=True, stdout=self.log, stderr=self.log)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        elif kind == "seat":
            signal_to(self.seats()[-1])
        elif kind == "worker":
            signal_to(self.training()[-1])
        else:
            for pid in self.training():
                signal_to(pid)

    def seats(self) -> list[int]:
        """Processes of Ray Train's workers on this cluster."""
        return sorted(pid for node in self.nodes for pid in children_of(raylet_of(node)) if "RayTrainWorker" in command_of(pid))

    def training(self) -> list[int]:
        """The processes that train: forked from a nursery, which is a child of a seat."""
        mothers = [pid for seat in self.seats() for pid in children_of(seat) if "ftcore.nursery" in command_of(pid)]
        return sorted(pid for mother in mothers for pid in children_of(mother))

    def half_written(self) -> bool:
        """Whether a checkpoint is being written just now."""
        return any((self.folder / "runs/chaos/checkpoints").glob(".step-*.tmp"))

    def journal(self, name: str) -> tuple[int, list[dict[str, Any]]]:
        """The journal file's inode (a restart makes a new one) and its whole lines."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        try:
            with path.open() as file:
                *whole, _ = file.read().split("\n")
                return os.fstat(file.fileno()).st_ino, [json.loads(line) for line in whole]
        except FileNotFoundError:
            return 0, []

    def weights(self, name: str) -> str:
        [file] = (self.folder / "runs" / name / "final").glob("*model.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        if self.cluster is not None:
            self.cluster.shutdown()
        self.log.close()


def compare(arena: Arena, kills: list[Kill], options: argparse.Namespace) -> bool:
    """The run left alone, the run with kills, and what they have in common."""
    arena.command("alone")
    finish(arena)
    alone = arena.journal("alone")[1]
    step_s = statistics.median(b["time"] - a["time"] for a, b in itertools.pairwise(alone))
    print(f"left alone: {len(alone)} steps, {1000 * step_s:.0f} ms each (median)", flush=True)
    arena.command("chaos")
    for number, kill in enumerate(kills, 1):
        suffer(arena, kill)
        print(
            f"kill {number:>2} (seed {options.seed}): {kill.kind:<10} after step {kill.seen:>4}; next step after {kill.next_s:5.1f} s, "
            f"further than before after {kill.further_s:5.1f} s", flush=True,
        )  # fmt: skip
    finish(arena)
    return judge(arena, kills, alone, options)


def suffer(arena: Arena, kill: Kill) -> None:
    """Waits for the moment, kills, and waits until the run is further than it was. Raises SystemExit when it does not go on."""
    wait_for(arena, lambda: last_step(arena) >= kill.step, 0.02)
    time.sleep(kill.delay_s)
    if kill.kind == "checkpoint":
        wait_for(arena, arena.half_written, 0.0)
    before, lines = arena.journal("chaos")
    kill.seen, kill.killed_at = lines[-1]["step"], time.time()
    arena.kill(kill.kind)

    def made() -> list[dict[str, Any]]:
        inode, lines = arena.journal("chaos")
        return [line for line in lines if line["time"] > kill.killed_at] if inode != before else []

    wait_for(arena, lambda: bool(made()), 0.05)
    kill.next_s = made()[0]["time"] - kill.killed_at
    wait_for(arena, lambda: any(line["step"] > kill.seen for line in made()), 0.05)
    kill.further_s = next(line["time"] for line in made() if line["step"] > kill.seen) - kill.killed_at


def last_step(arena: Arena) -> int:
    lines = arena.journal("chaos")[1]
    return int(lines[-1]["step"]) if lines else 0


def wait_for(arena: Arena, holds: Any, pause_s: float) -> None:
    until = time.monotonic() + GIVE_UP_S
    while not holds():
        if time.monotonic() > until or (arena.driver and arena.driver.poll() not in (None, 0)):
            sys.exit(f"the run did not go on; its log ends so:\n{(arena.folder / 'driver.log').read_text()[-4000:]}")
        time.sleep(pause_s)


def finish(arena: Arena) -> None:
    assert arena.driver is not None
    if arena.driver.wait(timeout=3 * GIVE_UP_S):
        sys.exit(f"the run failed; its log ends so:\n{(arena.folder / 'driver.log').read_text()[-4000:]}")


def judge(arena: Arena, kills: list[Kill], alone: list[dict[str, Any]], options: argparse.Namespace) -> bool:
    lines = arena.journal("chaos")[1]
    if [line["step"] for line in lines] != [line["step"] for line in alone]:
        print("the journal has steps twice or lacks some")
        return False
    differences = {a["step"]: abs(a["loss"] - b["loss"]) for a, b in zip(alone, lines, strict=True)}
    same_end = arena.weights("alone") == arena.weights("chaos")
    ends = [kill.seen for kill in kills[1:]] + [len(lines)]
    identical = sum(
        all(differences[step] <= options.tolerance for step in range(kill.seen + 1, end + 1)) for kill, end in zip(kills, ends, strict=True)
    )
    for kind in dict.fromkeys(kill.kind for kill in kills):
        mine = [kill for kill in kills if kill.kind == kind]
        slowest, lost = max(kill.next_s for kill in mine), statistics.mean(kill.further_s for kill in mine)
        print(f"{kind:<10} {len(mine)} kills: next step after at most {slowest:.1f} s; useful time at one a minute {1 - lost / 60:.0%}")
    lost = statistics.mean(kill.further_s for kill in kills)
    print(f"all kinds: useful time at one kill a minute {1 - lost / 60:.0%} (a minute less the mean time until further than before)")
    print(f"largest difference of a loss {max(differences.values()):.3g}; final weights {'the same bytes' if same_end else 'DIFFERENT'}")
    print(f"{len(kills)} kills (seed {options.seed}): {len(kills)} finished / {identical} identical")
    return identical == len(kills) and (same_end or options.tolerance > 0)


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def children_of(parent: int) -> list[int]:
    return [int(place.name) for place in Path("/proc").glob("[0-9]*") if parent_of(int(place.name)) == parent]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def signal_to(pid: int) -> None:
    if pid > 1:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
