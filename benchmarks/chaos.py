"""Kills a run again and again at seeded moments, and compares what it comes to with a run that was left alone.

    python benchmarks/chaos.py --kills 20 --seed 0 [--method lora|qlora|full] [--backend plain|deepspeed] [--where worker,node,driver,...]

A cluster of a head and three nodes of one CPU each is started on this machine; `pipelines/sft.py` trains a tiny model on two workers.
One line a kill: its number, what was killed, after which step, the seconds until the next step was made, and until the run was further
than it had been. Then `N kills: N finished / N identical`: the run went on after the kill, and its losses until the next one (and the
final weights) are bit for bit those of the run that was left alone (`--tolerance` for a backend that is not exact).

worker: SIGKILL to one training process. seat: SIGKILL to the Ray Train worker above it. node: a whole node, and a new one. driver: SIGKILL
to the command, then the same command. checkpoint: SIGKILL to all training processes as the folder of a half-written checkpoint appears.
upload: the same in a second run whose folder is on s3 (the tests' stand-in), as a request that puts a part of a checkpoint passes.
With `--where leave,terminate` a node that trains is drained (`ray drain-node`), a training process gets SIGTERM as a cloud sends it: the
run goes on elsewhere, without a failure. With `--where lose,gain,drain` (in that order) there are two nodes and workers {min: 1, max: 2}:
a node is killed for good, a new one comes, one is drained (and one comes for it).
"""

# ruff: noqa: E402 (the checkout is put on the path first, for this process and those it starts)
from __future__ import annotations

import argparse
import hashlib
import itertools
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
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
# Ray gives its workers the least priority; on a machine that others use too, the seconds below would be theirs
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import yaml

from benchmarks.processes import all_processes, children_of, command_of, environment_of, parent_of, raylet_of, signal_to, signal_to_all
from ftcore.journal import read_lines
from ftcore.rundir import RunDir
from tests.conftest import make_tiny_model
from tests.ray.small_runs import write_rows
from tests.s3_faults import Request, faulty_proxy
from tests.s3_server import credentials_file, make_bucket, moto_server, variables

KINDS = ("worker", "seat", "node", "driver", "checkpoint", "upload")
ELASTIC = ("lose", "gain", "drain")
"""Not in the default: they change the number of workers, and with it the last digits and the draws of dropout. So these train in fp64
without dropout, where --tolerance 1e-9 holds over thousands of steps; in fp32 two such runs drift apart, as any two do."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "qlora": {"kind": "qlora", "rank": 4, "dropout": 0.1}, "full": {"kind": "full"},
}  # fmt: skip
BACKENDS: dict[str, dict[str, Any]] = {"plain": {"kind": "plain"}, "deepspeed": {"kind": "deepspeed", "zero": 3}}
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
    folder = Path(tempfile.mkdtemp(prefix="ftcore-chaos-"))
    began = time.monotonic()
    with ExitStack() as held:
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        s3 = S3(held, folder) if "upload" in kinds else None  # first: its variables are for all that starts after it
        arena = Arena(folder, recipe_in(folder, options), s3)
        held.callback(arena.close)
        arena.start()
        ok = compare(arena, plan(kinds, options), options)
    print(f"{time.monotonic() - began:.0f} s in all; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0 if ok else 1


class S3:
    """A bucket for the run that uploads, behind a proxy that sees each request pass."""

    def __init__(self, held: ExitStack, folder: Path) -> None:
        server = held.enter_context(moto_server())
        self.bucket = make_bucket(server, "chaos")
        self.proxy = held.enter_context(faulty_proxy(server))
        os.environ.update(variables(self.proxy.url, credentials_file(folder)))

    def at_upload(self, number: int, act: Callable[[], None]) -> threading.Event:
        """Calls `act` once, as the `number`-th next request that puts something into a checkpoint arrives; then the event is set."""
        done, left = threading.Event(), [number]

        def watch(request: Request) -> None:
            if request.method == "PUT" and "/checkpoints/step-" in request.path and not done.is_set():
                left[0] -= 1
                if left[0] <= 0:
                    act()
                    done.set()

        self.proxy.watch = watch
        return done


@dataclass
class Kill:
    """One planned kill, and what came of it."""

    kind: str
    step: int
    delay_s: float
    request: int = 1
    """upload: at which request of a checkpoint."""
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
    gap, kills = options.steps_between, []
    for run in ([kind for kind in chosen if kind != "upload"], [kind for kind in chosen if kind == "upload"]):
        kills += [Kill(kind, (i + 1) * gap + draw.randrange(gap), draw.random() * 0.3, draw.randint(1, 4)) for i, kind in enumerate(run)]
    return kills


def recipe_in(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    elastic, rows = "lose" in options.where, write_rows(folder / "rows.jsonl", count=200)
    method = METHODS[options.method] | ({"dropout": 0.0} if elastic and options.method != "full" else {})
    return {
        "name": "chaos", "stage": "sft",
        "model": {"path": str(make_tiny_model(folder / "base")), "dtype": "fp64" if elastic else "fp32"},
        "data": {"sources": [str(rows)], "max_length": 64, "validation": 0, "cache": str(folder / "prepared")},
        "method": method, "backend": BACKENDS[options.backend],
        "resources": {"workers": {"min": 1, "max": 2} if elastic else 2, "max_failures": -1},
        "optim": {"batch_size": 4, "lr": 1e-3, "max_steps": options.steps_between * (options.kills + 2), "epochs": 1},
        "output": {"runs": str(folder / "runs"), "store": str(folder / "store"), "checkpoint_every": EVERY},
    }  # fmt: skip


@dataclass
class Arena:
    """The cluster, the command that trains on it, and the ways to kill parts of them."""

    folder: Path
    recipe: dict[str, Any]
    s3: S3 | None = None
    name: str = "chaos"
    nodes: list[Any] = field(default_factory=list)
    cluster: Any = None
    driver: subprocess.Popen[bytes] | None = None
    log: Any = None

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self.log = (self.folder / "driver.log").open("ab")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3 if self.recipe["resources"]["workers"] == 2 else 2):
            self.add_node()

    def add_node(self) -> None:
        """Tries again: a raylet that is slow on a loaded machine is given up by Ray after 30 s."""
        before = len(self.nodes)
        for last in (False, False, True):
            with nullcontext() if last else suppress(Exception):  # that is what Ray raises
                self.nodes.append(self.cluster.add_node(num_cpus=1))
            if len(self.nodes) > before:
                return

    def command(self, name: str) -> None:
        """`python pipelines/sft.py`, as a person would type it."""
        self.name = name
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        words = [sys.executable, str(ROOT / "pipelines/sft.py"), "recipe.yaml", f"name={name}", f"output.runs={self.runs(name)}"]
        variables = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        self.driver = subprocess.Popen(words, cwd=self.folder, env=variables, stdout=self.log, stderr=subprocess.STDOUT)

    def runs(self, name: str) -> str:
        """Where this run's folder lies: a run that uploads is on s3."""
        return f"{self.s3.bucket}/runs" if self.s3 and name == "uploads" else str(self.folder / "runs")

    def kill(self, kind: str) -> None:
        assert self.driver is not None
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.command(self.name)
        elif kind == "node":
            victim = self.busy_node()
            signal_to_all(raylet_of(victim))
            for nursery in self.nurseries():  # these nodes are one machine and share it: the new node must not find it ready
                signal_to(nursery)
            self.nodes.remove(victim)
            self.cluster.remove_node(victim, allow_graceful=False)
            self.add_node()
        elif kind == "lose":
            signal_to_all(raylet_of(self.nodes[-1]))
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        elif kind == "gain":
            self.add_node()
        elif kind in ("drain", "leave", "terminate"):
            if kind == "terminate":
                signal_to(self.training()[-1], signal.SIGTERM)
            else:
                self.drain(self.nodes[-1] if kind == "drain" else self.busy_node())
            self.add_node()
        elif kind == "seat":
            signal_to(self.seats()[-1])
        elif kind == "worker":
            signal_to(self.training()[-1])
        else:
            for pid in self.training():
                signal_to(pid)

    def drain(self, node: Any) -> None:
        words = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address]
        words += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        subprocess.run([*words, "--deadline-remaining-seconds", "120"], check=True, stdout=self.log, stderr=self.log)

    def busy_node(self) -> Any:
        """One that trains; a node that left is still there, and is not meant."""
        busy = {parent_of(pid) for pid in self.seats()}
        return next(node for node in self.nodes if raylet_of(node) in busy)

    def seats(self) -> list[int]:
        """Processes of Ray Train's workers on this cluster."""
        return sorted(pid for node in self.nodes for pid in children_of(raylet_of(node)) if "RayTrainWorker" in command_of(pid))

    def training(self) -> list[int]:
        """The processes that train: forked from a nursery."""
        return sorted(pid for nursery in self.nurseries() for pid in children_of(nursery))

    def nurseries(self) -> list[int]:
        """They belong to no seat; this cluster's are known by its token."""
        ours = f"RAY_AUTH_TOKEN={os.environ['RAY_AUTH_TOKEN']}"
        return [pid for pid in all_processes() if "ftcore.tending" in command_of(pid) and ours in environment_of(pid)]

    def half_written(self) -> bool:
        """Whether a checkpoint is being written just now."""
        return any((self.folder / "runs/chaos/checkpoints").glob(".step-*.tmp"))

    def journal(self, name: str) -> tuple[object, list[dict[str, Any]]]:
        """The journal file's inode (a restart makes a new one) and its whole lines. A remote one grows with each checkpoint."""
        if "://" in self.runs(name):
            return object(), read_lines(RunDir(self.runs(name), name))
        path = self.folder / "runs" / name / "metrics.jsonl"
        try:
            with path.open() as file:
                *whole, _ = file.read().split("\n")
                return os.fstat(file.fileno()).st_ino, [json.loads(line) for line in whole]
        except FileNotFoundError:
            return 0, []

    def weights(self, name: str) -> str:
        final = RunDir(self.runs(name), name).folder / "final"
        return "".join(hashlib.sha256(final.read(file)).hexdigest() for file in sorted(final.files()) if file.endswith("model.safetensors"))

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
    ok = [attack(arena, name, those, alone, options) for name, those in (
        ("chaos", [kill for kill in kills if kill.kind != "upload"]), ("uploads", [kill for kill in kills if kill.kind == "upload"]),
    ) if those]  # fmt: skip
    tell(kills, sum(len(identical) for identical in ok), options)
    return sum(len(identical) for identical in ok) == len(kills)


def attack(arena: Arena, name: str, kills: list[Kill], alone: list[dict[str, Any]], options: argparse.Namespace) -> list[Kill]:
    """One run with these kills; returns those after which it went on as the one that was left alone."""
    arena.command(name)
    for number, kill in enumerate(kills, 1):
        suffer(arena, kill)
        print(
            f"{name} kill {number:>2} (seed {options.seed}): {kill.kind:<10} after step {kill.seen:>4}; "
            f"next step after {kill.next_s:5.1f} s, further than before after {kill.further_s:5.1f} s "
            f"(load {os.getloadavg()[0]:.1f})", flush=True,
        )  # fmt: skip
    finish(arena)
    return judge(arena, name, kills, alone, options)


def suffer(arena: Arena, kill: Kill) -> None:
    """Waits for the moment, kills, and waits until the run is further than it was. Raises SystemExit when it does not go on."""
    wait_for(arena, lambda: last_step(arena) >= kill.step, 0.02)
    time.sleep(kill.delay_s)
    if kill.kind == "checkpoint":
        wait_for(arena, arena.half_written, 0.0)
    if kill.kind == "upload" and arena.s3:
        done = arena.s3.at_upload(kill.request, lambda: arena.kill("upload"))
        wait_for(arena, done.is_set, 0.02)
    before, lines = arena.journal(arena.name)
    kill.seen, kill.killed_at = lines[-1]["step"], time.time()
    if kill.kind != "upload":
        arena.kill(kill.kind)

    wait_for(arena, lambda: arena.journal(arena.name)[0] != before, 0.05)
    again_s = 0.0 if kill.kind == "upload" else time.time()  # a remote journal shows no restart; it lacks what was not sealed

    def made() -> list[dict[str, Any]]:
        return [line for line in arena.journal(arena.name)[1] if line["time"] > kill.killed_at]

    wait_for(arena, lambda: any(line["time"] > again_s and line["step"] > kill.seen for line in made()), 0.05)
    times = [kill.killed_at, *(line["time"] for line in made())]
    kill.next_s = max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])[1] - kill.killed_at  # others may outlive it by a step
    further = next(line["time"] for line in made() if line["step"] > kill.seen and line["time"] >= kill.killed_at + kill.next_s)
    kill.further_s = further - kill.killed_at


def last_step(arena: Arena) -> int:
    lines = arena.journal(arena.name)[1]
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


def judge(arena: Arena, name: str, kills: list[Kill], alone: list[dict[str, Any]], options: argparse.Namespace) -> list[Kill]:
    """The kills after which all losses until the next one, and in the end the weights, are those of the run that was left alone."""
    lines = arena.journal(name)[1]
    if [line["step"] for line in lines] != [line["step"] for line in alone]:
        print(f"{name}: the journal has steps twice or lacks some")
        return []
    differences = {a["step"]: abs(a["loss"] - b["loss"]) for a, b in zip(alone, lines, strict=True)}
    same_end = arena.weights("alone") == arena.weights(name)
    print(
        f"{name}: largest difference of a loss {max(differences.values()):.3g}; "
        f"final weights {'the same bytes' if same_end else 'DIFFERENT'}",
        flush=True,
    )
    if not same_end and not options.tolerance:
        return []
    ends = [kill.seen for kill in kills[1:]] + [len(lines)]
    return [
        kill for kill, end in zip(kills, ends, strict=True)
        if all(differences[step] <= options.tolerance for step in range(kill.seen + 1, end + 1))
    ]  # fmt: skip


def tell(kills: list[Kill], num_identical: int, options: argparse.Namespace) -> None:
    for kind in dict.fromkeys(kill.kind for kill in kills):
        mine = [kill for kill in kills if kill.kind == kind]
        middle, slowest, lost = (f([kill.next_s for kill in mine]) for f in (statistics.median, max, statistics.mean))
        print(f"{kind:<10} {len(mine)} kills: next step after {middle:.1f} s (median), at most {slowest:.1f} s; mean {lost:.1f} s")
    lost = statistics.mean(kill.further_s for kill in kills)
    print(f"all kinds: useful time at one kill a minute {1 - lost / 60:.0%} (a minute less the mean time until further than before)")
    print(f"{len(kills)} kills (seed {options.seed}): {len(kills)} finished / {num_identical} identical")


if __name__ == "__main__":
    sys.exit(main())
