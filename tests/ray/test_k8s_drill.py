"""The drill: what Kubernetes does to pods, done to the manifests' own clusters on real Ray, with what it costs counted.

`make proof ARGS="-k drill"` prints the figures of k8s/README.md.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bridge import why_not
from ftcore.adapters import AdapterStore
from tests.pods import (
    ENDED,
    Load,
    Nodes,
    built,
    cluster_of,
    evicted,
    finished,
    log_of,
    redis_server,
    running,
    serve_state,
    soon,
    status,
    submit,
)  # fmt: skip
from tests.ray.test_k8s_pods import claim_of, key_of, published, up, upgraded
from tests.serve_command import free_port

pytestmark = [
    pytest.mark.ray,
    pytest.mark.proof,
    pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}"),
]
HEAD_AWAY_S = 20.0


def steps_of(claim: Path) -> list[int]:
    """Every step in the order in which its line was written."""
    path = claim / "runs/acme-monday/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def resumed(nodes: Nodes, job: str) -> list[int]:
    """The steps after which a job went on, one each time."""
    return [int(step) for step in re.findall(r"going on after step (\d+)", log_of(nodes, job))]


def at_step(nodes: Nodes, claim: Path, step: int) -> None:
    """Waits until training came so far."""

    def came() -> bool:
        assert status(nodes, "sft") not in ENDED, log_of(nodes, "sft")[-3000:]
        return max(steps_of(claim), default=0) >= step

    soon(f"step {step}", came, limit_s=300, every_s=1)


def test_drill_of_training(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, 120)
    job = built("base", claim)["RayJob", "sft"]
    group = cluster_of(job)["workerGroupSpecs"][0]

    def disturbed(nodes: Nodes, what: str, name: str, after: int) -> None:
        """Waits for a step, lets something happen, waits until training goes on; what it cost."""
        at_step(nodes, claim, after)
        began, before = time.monotonic(), len(resumed(nodes, "sft"))
        if what == "evicted":
            took, code = evicted(nodes, 1, group)
            assert code == 0, "the hook waited in vain"
            assert took < group["template"]["spec"]["terminationGracePeriodSeconds"]
        else:
            nodes.kill_node(2)
        reached = max(steps_of(claim))
        nodes.replace(1 if what == "evicted" else 2)
        soon("training goes on", lambda: len(resumed(nodes, "sft")) > before and max(steps_of(claim)) > reached, limit_s=300)
        lost = reached - resumed(nodes, "sft")[-1]
        assert lost == 0 or what != "evicted", "with notice no step is lost"
        print(f"{name}: {lost} steps lost of {reached}, {time.monotonic() - began:.0f} s until the next new one")

    with running(job, tmp_path, workers=2) as nodes:
        submit(nodes, job, "sft")
        disturbed(nodes, "evicted", "a worker's pod, with notice", 8)
        disturbed(nodes, "gone", "a worker's node, without a word", 22)
        at_step(nodes, claim, 40)
    reached = max(steps_of(claim))
    with running(job, tmp_path, workers=2) as nodes:  # the head is gone, and with it the cluster: backoffLimit makes another
        assert finished(nodes, submit(nodes, job, "sft-retry"), 600) == "SUCCEEDED", log_of(nodes, "sft-retry")[-3000:]
        print(f"the head and with it the cluster, a new one for it: {reached - resumed(nodes, 'sft-retry')[-1]} steps lost of {reached}")
    steps = steps_of(claim)
    assert set(steps) == set(range(1, max(steps) + 1))
    assert AdapterStore(claim / "adapters").resolve("acme/desktop")


@contextmanager
def watched(load: Load, endpoints: list[str], leaving: set[str]) -> Iterator[None]:
    """Keeps the endpoints of a service: those that answer their readiness probe and were not told to go."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            ready = [each for each in endpoints if each not in leaving and load.ready(each)]
            load.endpoints[:] = ready or load.endpoints
            over.wait(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed (Debian: apt install redis-server)")
def test_drill_of_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = tmp_path / "claim"
    claim.mkdir()
    service, ref = built("prod", claim)["RayService", "serve"], published(claim, tmp_path)
    group = cluster_of(service)["workerGroupSpecs"][0]
    load = Load(key_of(claim, capsys), "desktop", [])

    def tell(what: str, began: float, before: int, more: str = "") -> None:
        with capsys.disabled():
            print(f"{what}: {load.answered - before} answered, {len(load.failed)} failed, {time.monotonic() - began:.0f} s{more}")
        assert not load.failed, load.failed[:3]
        assert load.answered > before, "somebody asked all the while"

    with redis_server(tmp_path, free_port()) as redis, running(service, tmp_path / "blue", workers=2, redis=redis) as nodes:
        seconds = up(nodes, service, load)
        with capsys.disabled():
            print(f"from nothing to ready: {seconds:.0f} s")
        endpoints, leaving = [f"http://{address}:8000" for address in nodes.addresses[1:]], set[str]()
        load.endpoints[:] = endpoints
        with watched(load, endpoints, leaving), load.of(4):
            soon("answers", lambda: load.answered > 20 or load.failed)
            began, before = time.monotonic(), load.answered
            upgraded(nodes, service)
            tell("the config changed in place", began, before, f", longest answer {load.longest_s:.1f} s")

            began, before = time.monotonic(), load.answered
            nodes.kill_node(0)
            time.sleep(HEAD_AWAY_S)
            tell("head away", began, before)
            back = time.monotonic()
            nodes.replace(0)
            soon("Serve's controller is back", lambda: serve_state(nodes) == "RUNNING", limit_s=180)
            tell("head back", began, before, f", {time.monotonic() - back:.0f} s after its start Serve says RUNNING")

            began, before = time.monotonic(), load.answered
            leaving.add(endpoints[0])
            load.endpoints[:] = endpoints[1:]
            took, code = evicted(nodes, 1, group)
            gone = f", gone after {took:.0f} s (hook {'in time' if code == 0 else 'out of time'})"
            nodes.replace(1)
            leaving.clear()
            soon("the new pod is ready", lambda: endpoints[0] in load.endpoints, limit_s=240)
            tell("a worker's pod evicted and replaced", began, before, gone)

        with load.of(4):  # as upgradeStrategy NewCluster: another cluster beside this one; traffic moves when it answers
            began, before = time.monotonic(), load.answered
            with running(service, tmp_path / "green", workers=2, redis=replace(redis, cluster="green")) as green:
                seconds = up(green, service, Load(load.key, load.model, []))
                load.endpoints[:] = [f"http://{address}:8000" for address in green.addresses[1:]]
                moved = load.answered
                soon("the new cluster answers", lambda: load.answered > moved + 20 or load.failed)
                for node in range(3):
                    nodes.kill_node(node)
                left = load.answered
                soon("answers without the old one", lambda: load.answered > left + 20 or load.failed)
                tell("a new cluster beside the old one, which goes", began, before, f", the new one ready after {seconds:.0f} s")
                load.stop()
    assert set(load.versions) == {ref.full}
