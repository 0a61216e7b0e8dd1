"""Pods as processes: what a built overlay says of a Ray cluster, done on the nodes of a NetnsCluster: the same variables and words, claims
as folders, hooks run and signals sent as a kubelet does. What KubeRay's operator does over HTTP is done over the same HTTP.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import httpx2 as httpx
import yaml

from cluster.kube.building import build
from cluster.kube.documents import Document
from cluster.netns import NetnsCluster

REPO = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
CLAIM, IMAGE, HOST = "/mnt/ftcore", "/app", "{host}"
"""In pods; HOST: this machine, as nodes see it."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
Tree = dict[str, Any]


def built(overlay: str, claim: Path) -> dict[tuple[str, str], Tree]:
    """(kind, name) -> object of k8s/overlays/NAME (or the base), with the claim and the image's checkout where they are here."""
    folder = REPO / "k8s" / (overlay if overlay == "base" else f"overlays/{overlay}")
    found = [document for document in build(folder).documents if isinstance(document, Document)]
    return {(document.kind, document.name): here(document.tree, claim) for document in found}


def here(value: Any, claim: Path) -> Any:
    """A value with the paths of pods as paths of this machine."""
    if isinstance(value, str):
        return re.sub(rf"(?<![\w/.-]){IMAGE}/", f"{REPO}/", value.replace(CLAIM, str(claim)))
    if isinstance(value, dict):
        return {name: here(inner, claim) for name, inner in value.items()}
    return [here(inner, claim) for inner in value] if isinstance(value, list) else value


def cluster_of(resource: Tree) -> Tree:
    """The RayCluster in a RayJob, a RayService or itself."""
    spec: Tree = resource["spec"]
    inner: Tree = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return inner


def container(group: Tree) -> Tree:
    first: Tree = group["template"]["spec"]["containers"][0]
    return first


def variables(group: Tree) -> dict[str, str]:
    """What the pod sets itself; its secrets are optional."""
    return {entry["name"]: entry["value"] for entry in container(group).get("env", []) if "value" in entry}


@contextmanager
def running(resource: Tree, home: Path, *, workers: int, redis: Redis | None = None) -> Iterator[Nodes]:
    """The Ray cluster of a resource: its head, and so many workers of its first group."""
    spec = cluster_of(resource)
    head, group = spec["headGroupSpec"], spec["workerGroupSpecs"][0]
    cpus = [float(head["rayStartParams"].get("num-cpus", 1)), *[float(container(group)["resources"]["limits"]["cpu"])] * workers]
    tmp = home / "tmp"  # each pod has its own, at one path
    said = {"FTCORE_PREEMPTION_FILE": str(tmp / "preempted")}
    own = {node: {**variables(group), **said} for node in range(1, workers + 1)}
    own[0] = {**variables(head), **said, **(redis.variables if redis else {})}
    private = {node: [tmp] for node in range(workers + 1)}
    everywhere = {
        "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",  # as the operator sets it
        **({"RAY_gcs_rpc_server_reconnect_timeout_s": "600"} if redis else {}),  # as the operator sets it
    }  # fmt: skip
    gpus = container(group)["resources"]["limits"].get("nvidia.com/gpu", "0")
    words = {node: [f"--num-gpus={gpus}"] for node in range(1, workers + 1)} if gpus != "0" else {}
    words[0] = ["--redis-password=" + redis.password] if redis else []
    how: Tree = {"environment": own, "everywhere": everywhere, "private": private, "words": words}
    with Nodes(workers + 1, cpus, log=lambda line: None, **how) as nodes:
        yield nodes


class Nodes(NetnsCluster):
    def variables(self, node: int) -> dict[str, str]:
        return {name: value.replace(HOST, self.host_address) for name, value in super().variables(node).items()}

    def replace(self, node: int) -> None:
        """A new pod in the place of one that is gone: its /tmp is empty."""
        for own in (f"private-{node}-0", str(node)):
            shutil.rmtree(self.folder / own)
        self.start_node(node)


@dataclass
class Redis:
    """A redis-server of this machine, with a password."""

    address: str
    password: str
    cluster: str = "blue"

    @property
    def variables(self) -> dict[str, str]:
        """As the operator puts them into the head."""
        return {"RAY_REDIS_ADDRESS": self.address, "REDIS_PASSWORD": self.password, "RAY_external_storage_namespace": self.cluster}


@contextmanager
def redis_server(folder: Path, port: int) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    assert program, "redis-server is not installed"
    words = [program, "--port", str(port), "--bind", "0.0.0.0", "--requirepass", "drill", "--appendonly", "yes", "--dir", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield Redis(f"{HOST}:{port}", "drill")
    finally:
        process.terminate()
        process.wait(10)


def asked(nodes: NetnsCluster, path: str, body: Any = None, method: str = "") -> Any:
    """The head's dashboard, as the operator asks it."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {nodes.token}", "X-Ray-Authorization": f"Bearer {nodes.token}"}
    request = Request(nodes.dashboard + path, data, headers, method=method or ("POST" if data else "GET"))
    try:
        with urlopen(request, timeout=120) as reply:
            text = reply.read()
    except HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode(errors='replace')[:2000]}") from error
    return json.loads(text) if text else None


def submit(nodes: NetnsCluster, job: Tree, name: str) -> str:
    """What the submitter's container does; the id of the job."""
    words = [RAY, "job", "submit", "--address", nodes.dashboard, "--no-wait", "--submission-id", name, "--"]
    words += job["spec"]["entrypoint"].split()
    for _ in range(60):  # Ray's dashboard answers before its job agent on a busy node does
        done = subprocess.run(words, env=nodes.variables(0), capture_output=True, text=True, cwd="/", check=False)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    return name


def status(nodes: NetnsCluster, job: str) -> str:
    return str(asked(nodes, f"/api/jobs/{job}")["status"])


def log_of(nodes: NetnsCluster, job: str) -> str:
    return str(asked(nodes, f"/api/jobs/{job}/logs")["logs"])


def finished(nodes: NetnsCluster, job: str, limit_s: float = 900) -> str:
    """How it ended: SUCCEEDED, FAILED."""
    until = time.monotonic() + limit_s
    while (now := status(nodes, job)) not in ENDED:
        assert time.monotonic() < until, f"{now} after {limit_s:g} s\n{log_of(nodes, job)[-3000:]}"
        time.sleep(0.5)
    return now


def apply_serve(nodes: NetnsCluster, service: Tree) -> Tree:
    """serveConfigV2 as the operator puts it; what was put."""
    config: Tree = yaml.safe_load(service["spec"]["serveConfigV2"])
    asked(nodes, "/api/serve/applications/", config, "PUT")
    return config


def serve_state(nodes: NetnsCluster) -> str:
    """Of the application: RUNNING, DEPLOYING, DEPLOY_FAILED with why, ..."""
    try:
        found = asked(nodes, "/api/serve/applications/")["applications"]["ftcore"]
    except (URLError, OSError, KeyError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return str(found["status"]) if found["status"] in ("RUNNING", "DEPLOYING") else f"{found['status']}: {found['message']}"


def soon(what: str, done: Any, limit_s: float = 600, every_s: float = 0.25) -> float:
    """Seconds until `done()` is true."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < limit_s, f"not after {limit_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - began


def evicted(nodes: NetnsCluster, node: int, group: Tree) -> tuple[float, int]:
    """A pod that is asked to go: its preStop hook, SIGTERM, after the grace period SIGKILL. (Seconds it took, the hook's exit code.)"""
    grace, began = float(group["template"]["spec"]["terminationGracePeriodSeconds"]), time.monotonic()
    hook = container(group)["lifecycle"]["preStop"]["exec"]["command"]
    words = [sys.executable if word == "python" else word for word in hook]
    code = subprocess.run(nodes.inside(node, words), env=nodes.variables(node), cwd=REPO, timeout=grace, check=False).returncode
    for pid in nodes.pids(node):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while nodes.pids(node) and time.monotonic() - began < grace:
        time.sleep(0.1)
    took = time.monotonic() - began
    nodes.kill_node(node)
    return took, code


@dataclass
class Load:
    """Clients that ask without a pause, as an ingress sends them: to pods that are ready, each connection kept."""

    key: str
    model: str
    endpoints: list[str]
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @contextmanager
    def of(self, clients: int) -> Iterator[Load]:
        self._over.clear()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        body = {"model": self.model, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0}
        with httpx.Client(headers={"Authorization": f"Bearer {self.key}"}, timeout=60) as http:
            while not self._over.is_set():
                where, began = rng.choice(list(self.endpoints)), time.monotonic()
                try:
                    reply = http.post(f"{where}/v1/completions", json=body)
                    if reply.status_code == 200:
                        self.answered += 1
                        self.versions[reply.headers["x-ftcore-adapter"]] += 1
                    else:
                        self.failed.append(f"{reply.status_code} {reply.text[:200]}")
                except httpx.HTTPError as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def ready(self, endpoint: str) -> bool:
        """As the readiness probe that the operator gives a serving worker asks."""
        try:
            return httpx.get(f"{endpoint}/-/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False
