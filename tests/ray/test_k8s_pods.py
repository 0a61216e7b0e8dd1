"""The manifests of k8s/ without a cluster: their entry points and Serve configs run on real Ray, pods as hosts of their own."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import yaml

from cluster.bridge import why_not
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.cli import main
from ftcore.demo.tenants import demo_teams, write_day
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from tests.oracles import make_adapter
from tests.pods import REPO, Load, Nodes, Tree, apply_serve, built, finished, log_of, running, serve_state, soon, submit

pytestmark = [pytest.mark.ray, pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}")]


def claim_of(folder: Path, num_rows: int) -> Path:
    """A claim with rows in it."""
    day = write_day(demo_teams(0)[0], folder / "made", day="monday", num_train=num_rows, num_test=1, seed=0)
    claim = folder / "claim"
    (claim / "data").mkdir(parents=True)
    day.rows.rename(claim / "data/rows.jsonl")
    return claim


def key_of(claim: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["tenants", "add", str(claim / "tenants"), "acme"]) == 0
    return next(word for word in capsys.readouterr().out.split() if word.startswith("ft-") or len(word) > 40)


def published(claim: Path, home: Path) -> AdapterRef:
    base = REPO / "ftcore/demo/base"
    store = AdapterStore(claim / "adapters")
    made = make_adapter(base, home / "made-adapter", 1)
    ref = import_adapter(made, "acme/desktop", Model(path=str(base)), store, log=lambda _: None)
    store.promote(ref)
    return ref


def up(nodes: Nodes, service: Tree, load: Load) -> float:
    """Puts the application there and waits until each worker's pod is ready; seconds."""
    began = time.monotonic()
    apply_serve(nodes, service)
    soon("the service runs", lambda: serve_state(nodes) == "RUNNING", limit_s=300)
    for address in nodes.addresses[1:]:
        soon("a worker is ready", lambda address=address: load.ready(f"http://{address}:8000"))
    return time.monotonic() - began


@pytest.mark.parametrize(("overlay", "workers"), [("dev", 1), pytest.param("base", 2, marks=pytest.mark.proof)])
def test_a_job_trains_and_publishes_on_its_pods(overlay: str, workers: int, tmp_path: Path) -> None:
    """A head that computes nothing and the workers' pods, each a host of its own."""
    claim = claim_of(tmp_path, 24)
    job = built(overlay, claim)["RayJob", "sft"]
    with running(job, tmp_path, workers=workers) as nodes:
        assert finished(nodes, submit(nodes, job, "sft")) == "SUCCEEDED", log_of(nodes, "sft")[-3000:]
    store = AdapterStore(claim / "adapters")
    assert store.verify(store.resolve("acme/desktop")).world_size == workers


@pytest.mark.proof
def test_the_dev_overlay_trains_publishes_serves_and_is_upgraded_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = claim_of(tmp_path, 40)
    found = built("dev", claim)
    job, service = found["RayJob", "sft"], found["RayService", "serve"]
    with running(job, tmp_path, workers=1) as nodes:
        assert finished(nodes, submit(nodes, job, "sft")) == "SUCCEEDED", log_of(nodes, "sft")[-3000:]
        ref = AdapterStore(claim / "adapters").resolve("acme/desktop")
        key = key_of(claim, capsys)
        apply_serve(nodes, service)
        soon("the service runs", lambda: serve_state(nodes) == "RUNNING")
        load = Load(key, "desktop", [f"http://{nodes.addresses[1]}:8000"])
        soon("its worker is ready", lambda: load.ready(load.endpoints[0]))
        with load.of(3):
            soon("answers", lambda: load.answered > 5 or load.failed)
            seconds = upgraded(nodes, service)
            before = load.answered
            soon("answers after the upgrade", lambda: load.answered > before + 5 or load.failed)
        assert not load.failed, load.failed[:3]
        assert set(load.versions) == {ref.full}
    print(f"upgrade of the config under load: {load.answered} answered, 0 failed, {seconds:.1f} s, longest {load.longest_s:.1f} s")


def upgraded(nodes: Nodes, service: dict) -> float:
    """The same application with other arguments, rolled out in place. Seconds until it runs."""
    changed = copy.deepcopy(service)
    config = yaml.safe_load(changed["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["max_body_kib"] = 512
    changed["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    apply_serve(nodes, changed)
    soon("the change is seen", lambda: serve_state(nodes) != "RUNNING", limit_s=90, every_s=0.05)
    return soon("the new version runs", lambda: serve_state(nodes) == "RUNNING")


@pytest.mark.proof
def test_the_search_of_the_dev_overlay_ends_in_a_published_winner(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, 60)
    job = built("dev", claim)["RayJob", "tune"]
    with running(job, tmp_path, workers=1) as nodes:
        assert finished(nodes, submit(nodes, job, "tune"), 500) == "SUCCEEDED", log_of(nodes, "tune")[-3000:]
    assert AdapterStore(claim / "adapters").resolve("acme/search")


@pytest.mark.proof
@pytest.mark.parametrize("overlay", ["base", "gpu"])
def test_the_service_of_an_overlay_starts_and_answers(overlay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own configuration on its own pods. gpu: Ray counts GPUs that are not there, and the image's base stands for one of the hub."""
    claim = tmp_path / "claim"
    claim.mkdir()
    service = built(overlay, claim)["RayService", "serve"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    arguments = config["applications"][0]["args"]
    arguments["base"] = str(REPO / "ftcore/demo/base")
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    ref = published(claim, tmp_path)
    load = Load(key_of(claim, capsys), "desktop", [])
    with running(service, tmp_path, workers=arguments["replicas"]) as nodes:
        up(nodes, service, load)
        load.endpoints[:] = [f"http://{address}:8000" for address in nodes.addresses[1:]]
        with load.of(2):
            soon("answers", lambda: load.answered > 20 or load.failed)
    assert not load.failed, load.failed[:3]
    assert set(load.versions) == {ref.full}
