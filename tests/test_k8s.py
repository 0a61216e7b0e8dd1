"""k8s/: every overlay builds and is clean, what it starts is there and valid, and a rendered recipe gets what its forecast says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from cluster.kube.building import build
from cluster.kube.documents import Document
from cluster.kube.jobs import GPU, gib, job_name
from ftcore.cli import main
from ftcore.forecast import forecast
from ftcore.memory import GIB
from ftcore.recipe import load_recipe
from serving.settings import ServeSettings
from serving.tenants import key_hash, new_clear_key
from tests.pods import here
from tests.serve_command import free_port
from tests.unit.test_shapes import QWEN2_72B

REPO = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(path.name for path in (REPO / "k8s/overlays").iterdir())
pytestmark = pytest.mark.skipif(
    not (shutil.which("kustomize") or shutil.which("kubectl")), reason="neither kustomize nor kubectl is installed: nothing can be built"
)
DEMO = ["pipelines/recipes/demo-lora.yaml", "model.path=/app/ftcore/demo/base", "data.sources.0.path=/mnt/ftcore/data/rows.jsonl"]
BIG = [
    "pipelines/recipes/sft-full.yaml", "model.path=/mnt/ftcore/models/qwen-72b", "data.sources.0.path=s3://rows/day.jsonl",
    "backend={kind: deepspeed, zero: 3, gradient_checkpointing: true}", "resources={workers: 32, gpus_per_worker: 1, cpus_per_worker: 8}",
    "optim.batch_size=32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def objects(overlay: str) -> list[dict[str, Any]]:
    return [found.tree for found in build(REPO / "k8s/overlays" / overlay).documents if isinstance(found, Document)]


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [tree for tree in objects(overlay) if tree["kind"] == kind]


def lint(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["k8s", "lint", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)["flaws"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_and_is_clean(overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, flaws = lint(capsys, f"k8s/overlays/{overlay}", "--strict")
    assert not flaws and code == 0, flaws[:3]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_a_job_starts_is_there_and_valid(overlay: str, tmp_path: Path) -> None:
    for job in of_kind(overlay, "RayJob"):
        python, script, recipe, *words = shlex.split(here(job["spec"]["entrypoint"], tmp_path))
        assert python == "python" and Path(script).is_file() and Path(recipe).is_file(), job["spec"]["entrypoint"]
        overrides = [word for number, word in enumerate(words) if "=" in word and words[number - 1] != "--search"]
        asked = load_recipe(recipe, overrides).resources
        [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["replicas"] * int(limits["cpu"]) >= asked.max_workers * asked.cpus_per_worker
        assert group["replicas"] * int(limits.get(GPU, 0)) >= asked.max_workers * asked.gpus_per_worker
        if job["metadata"]["name"] == "sft":  # (a search fills what is left with further trials)
            assert (group["replicas"] - 1) * int(limits["cpu"]) < asked.max_workers * asked.cpus_per_worker, "a pod would have no worker"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_serve_config_names_what_the_application_has(overlay: str, tmp_path: Path) -> None:
    [service] = of_kind(overlay, "RayService")
    [application] = yaml.safe_load(here(service["spec"]["serveConfigV2"], tmp_path))["applications"]
    settings = ServeSettings.model_validate(application["args"])
    deployments = {each["name"]: each for each in application["deployments"]}
    assert set(deployments) == {"ingress", "engine"}
    assert deployments["engine"]["max_queued_requests"] == settings.queue
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) >= settings.num_cpus + settings.ingress.num_cpus and int(limits.get(GPU, 0)) >= settings.num_gpus
    assert group["maxReplicas"] >= settings.replicas.max


def test_the_admin_deployment_starts_and_knows_its_key(tmp_path: Path) -> None:
    [deployment] = [each for each in of_kind("dev", "Deployment") if each["metadata"]["name"] == "admin"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    for folder in ("adapters", "tenants"):
        (tmp_path / folder).mkdir()
    key, port = new_clear_key(), free_port()
    given = {"$(FTCORE_ADMIN_KEY_SHA256)": key_hash(key), "admin.host=0.0.0.0": "admin.host=127.0.0.1", "8001": str(port)}
    words = [sys.executable, *here([*container["command"][1:], *container["args"]], tmp_path)]
    for name, value in given.items():
        words = [word.replace(name, value) for word in words]
    with subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = next((line for line in process.stdout if str(port) in line), "")
            mine, other = ({"Authorization": f"Bearer {each}"} for each in (key, new_clear_key()))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/admin", headers=mine, trust_env=False) as http:
                made = http.post("/tenants", json={"name": "acme"})
                assert made.status_code == 201, said + made.text
                assert http.get("/tenants").json() == ["acme"]
                assert http.get("/tenants", headers=other).status_code == 401
        finally:
            process.terminate()
    assert process.returncode == 0


def cpu(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_image_one_ray(overlay: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    text = yaml.safe_dump_all(objects(overlay))
    assert set(re.findall(r"rayVersion: '?([\d.]+)", text)) == {pinned[1]}
    images = set(re.findall(r"image: (ftcore:\S+)", text))
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert images == {f"ftcore:{version}-ray{pinned[1]}" + "-cuda" * (overlay == "gpu")}


@pytest.mark.parametrize(("overlay", "kind"), [("kueue", "ClusterQueue"), ("volcano", "Queue")])
def test_what_fits_the_nodes_fits_the_queue(overlay: str, kind: str) -> None:
    [queue] = of_kind(overlay, kind)
    spec = queue["spec"]
    amounts = spec.get("capability") or {
        each["name"]: each["nominalQuota"]
        for group in spec["resourceGroups"]
        for flavor in group["flavors"]
        for each in flavor["resources"]
    }
    for job in of_kind(overlay, "RayJob"):
        notes = job["metadata"]["annotations"]
        number, node = int(notes["ftcore/nodes"]), yaml.safe_load(notes["ftcore/node"])
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
        submitter = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["resources"]["requests"]
        cpus = number * node["cpu"] + cpu(head["cpu"]) + cpu(submitter["cpu"])
        assert cpus <= cpu(str(amounts["cpu"]))
        assert number * gib(node["memory"]) + gib(head["memory"]) + gib(submitter["memory"]) <= gib(amounts["memory"])


def rendered(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["k8s", "render", *words]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize("overlay", ["dev", "kueue"])
def test_a_rendered_demo_is_clean_and_holds_its_forecast(overlay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, job = rendered(capsys, *DEMO, "resources.workers=2", "resources.cpus_per_worker=1", "--overlay", overlay)
    assert files["data"]["recipe.yaml"] == (REPO / DEMO[0]).read_text()
    assert ("suspend" in job["spec"]) == (overlay == "kueue")
    require_covered(job, [DEMO[0], "model.path=ftcore/demo/base", "resources.workers=2"])
    assert cleans(tmp_path, capsys, files, job) == 0


def test_a_rendered_70b_zero3_run_is_clean_and_holds_its_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_72B))
    files, job = rendered(capsys, *BIG, "--overlay", "gpu", "--config", str(tmp_path))
    group = require_covered(job, [BIG[0], f"model.path={tmp_path}", *BIG[3:]])
    assert (group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"][GPU]) == (4, "8")
    assert cleans(tmp_path, capsys, files, job) == 0


def require_covered(job: dict[str, Any], recipe: list[str]) -> dict[str, Any]:
    """The pods hold all workers, and each pod what its workers are forecast to need."""
    known = forecast(load_recipe(recipe[0], recipe[1:]))
    asked = known.recipe.resources
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    each = -(-asked.max_workers // group["replicas"])
    host = known.need.host_peak if known.need.on_gpu else known.need.peak
    assert gib(resources["requests"]["memory"]) >= each * host / GIB / 0.9
    assert int(resources["requests"]["cpu"]) >= each * asked.cpus_per_worker
    assert int(resources["requests"].get(GPU, 0)) == each * asked.gpus_per_worker
    return dict(group)


def cleans(folder: Path, capsys: pytest.CaptureFixture[str], *made: dict[str, Any]) -> int:
    """The lint's exit code, errors and warnings alike, of what was rendered."""
    (folder / "out").mkdir()
    (folder / "out/all.yaml").write_text(yaml.safe_dump_all(made))
    code, flaws = lint(capsys, str(folder / "out"), "--strict")
    assert not flaws, flaws[:3]
    return code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*DEMO, "--overlay", "gup"], ("--overlay", "gup", "did you mean gpu?")),
        ([*BIG, "--overlay", "dev"], ("resources", "0 GPUs a node", "--overlay gpu")),
        ([*BIG, "resources.workers=64", "--overlay", "gpu"], ("resources.workers", "32 GPUs in all", "64 GPUs", "resources.workers=32")),
        ([*BIG, "resources.workers=8", "--overlay", "gpu"], ("more memory than a worker has", "offload_optimizer")),
        ([*DEMO, "--overlay", "gpu"], ("leaves the overlay's GPUs alone", "resources.gpus_per_worker=1")),
        ([*DEMO, "resources.workers=9"], ("resources.workers", "1 nodes", "9 workers")),
        ([DEMO[0], DEMO[1]], ("the pods do not have this path", "data.sources.0.path", "/mnt/ftcore/acme-monday.rows.jsonl")),
        ([DEMO[0], DEMO[2]], ("the pods do not have this path", "model.path", "ftcore/demo/base")),
        ([DEMO[0], DEMO[2], "model.path=/mnt/ftcore/none"], ("cannot be counted from here", "--config DIR")),
        ([*DEMO, "method.rnk=4"], ("did you mean", "method.rank")),
        ([*DEMO, "--name", "A_run"], ("no name for a RayJob", "a-run")),
        ([*DEMO, "--overlay", "k8s"], ("no such overlay", "k8s", "kueue")),
    ],
)
def test_what_cannot_be_rendered_is_refused_with_a_way_out(
    words: list[str], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_72B))
    config = ["--config", str(tmp_path)] if words[: len(BIG)] == BIG else []
    assert main(["k8s", "render", *words, *config]) in (2, 3)
    told = capsys.readouterr()
    assert not told.out
    assert all(word in told.err for word in said), told.err


def test_a_name_becomes_one_that_the_operator_takes() -> None:
    assert job_name("acme-monday") == "acme-monday"
    assert job_name("2026 Über/Run_7") == "run-2026-ber-run-7"
    assert len(job_name("x" * 80)) == 47


def test_the_image_is_made_of_what_is_here_and_runs_as_the_pods_say() -> None:
    text = (REPO / "k8s/Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"ftcore", "cluster", "pipelines", "serving", "k8s", "pyproject.toml", "constraints.txt"} <= set(copied)
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept and all((REPO / name).exists() for name in copied)
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    asked = re.search(r"'\.\[([\w,]+)\]'", text)
    assert asked and set(asked[1].split(",")) <= set(project["optional-dependencies"])
    user = re.search(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user and f"runAsUser: {user[1]}" in (REPO / "k8s/base/sft.yaml").read_text()
    for needed in ("bash", "wget"):  # what the operator's probes and start commands call
        assert re.search(rf"install.*\b{needed}\b", text)
