"""Three Ray nodes with their own addresses on this machine: doctor, a run over all of them, a submitted job, a node lost in mid-run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml

from cluster.bridge import why_not
from cluster.netns import NetnsCluster
from ftcore.adapters import AdapterStore
from tests.ray.small_runs import write_rows

REPO = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}")]
STEPS = 300
RAY = str(Path(sys.executable).with_name("ray"))
SECRET = "hunter2-is-not-to-be-seen"


@pytest.fixture(scope="module")
def nodes() -> Iterator[NetnsCluster]:
    everywhere = {"PYTHONPATH": str(REPO), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1"}
    with NetnsCluster(3, everywhere=everywhere) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """recipe.yaml, the rows and all that the runs make; a folder that all nodes share."""
    folder = tmp_path_factory.mktemp("nodes")
    recipe = {
        "name": "whole", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "method": {"kind": "lora", "rank": 4}, "stage": "sft",
        "data": {"sources": [str(write_rows(folder / "rows.jsonl"))], "max_length": 64, "validation": 0, "cache": str(folder / "prepared")},
        "optim": {"batch_size": 4, "lr": 3e-3, "max_steps": STEPS, "epochs": 100},
        "output": {"runs": str(folder / "runs"), "store": str(folder / "store"), "adapter": "acme/nodes", "checkpoint_every": 20},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def losses(root: Path, name: str) -> dict[int, float]:
    lines = (json.loads(line) for line in (root / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def doctor(nodes: NetnsCluster, root: Path, *options: str) -> tuple[int, dict[tuple[str, str], str]]:
    """(exit code, {(check, node): text} of what is not in order)."""
    done = nodes.run(
        [sys.executable, "-m", "ftcore.cli", "doctor", str(root / "recipe.yaml"), "resources.workers=3", "--json", *options], cwd=REPO
    )
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)["findings"]
    return done.returncode, {(each["check"], each["node"]): each["text"] for each in told if each["level"] == "problem"}


@pytest.mark.proof
def test_doctor_finds_three_good_nodes_runnable(nodes: NetnsCluster, root: Path) -> None:
    assert doctor(nodes, root) == (0, {})


@pytest.mark.proof
def test_three_nodes_one_worker_each_end_in_a_published_adapter(nodes: NetnsCluster, root: Path) -> None:
    words = ["pipelines/sft.py", str(root / "recipe.yaml"), "name=three", "optim.max_steps=40"]
    done = nodes.run([sys.executable, *words, "resources.workers=3", "resources.placement=STRICT_SPREAD"], cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 workers on 3 nodes: " in done.stdout and all(f" on {address}" in done.stdout for address in nodes.addresses)
    store = AdapterStore(root / "store")
    assert store.verify(store.resolve("acme/nodes")).world_size == 3


@pytest.mark.proof
def test_a_node_killed_in_mid_run_is_replaced_and_the_losses_are_the_same(nodes: NetnsCluster, root: Path) -> None:
    undisturbed = nodes.run([sys.executable, "pipelines/sft.py", str(root / "recipe.yaml"), "resources.workers=2"], cwd=REPO)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    words = ["pipelines/sft.py", str(root / "recipe.yaml"), "name=killed", "resources.workers=2", "resources.placement=SPREAD"]
    driver = nodes.popen([sys.executable, *words], cwd=REPO, stderr=subprocess.STDOUT)
    while driver.poll() is None and not list((root / "runs" / "killed").glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.02)
    victim = next(node for node in (1, 2) if any("TrainWorker" in title(pid) for pid in nodes.pids(node)))
    nodes.kill_node(victim)
    said, _ = driver.communicate(timeout=240)
    nodes.start_node(victim)
    assert driver.returncode == 0, said
    assert "restarting from the newest sealed checkpoint" in said and said.count("2 workers on 2 nodes") == 2, said
    whole, killed = losses(root, "whole"), losses(root, "killed")
    assert list(killed) == list(whole) == list(range(1, STEPS + 1))
    assert max(abs(killed[step] - whole[step]) for step in whole) < 1e-4


@pytest.mark.proof
def test_a_submitted_search_spreads_over_the_nodes_and_publishes_its_winner(nodes: NetnsCluster, root: Path) -> None:
    """Trials that share bases, on as many nodes as there are; as `ray job submit` has it."""
    submit = [RAY, "job", "submit", "--address", nodes.dashboard, "--working-dir", ".", "--", "python", "pipelines/tune.py"]
    words = [str(root / "recipe.yaml"), "name=searched", "data.validation=0.2", "optim.max_steps=30", "output.adapter=acme/searched"]
    space = ["optim.lr={log: [1e-4, 3e-2]}", "method.rank={choice: [2, 4, 8]}", "method.alpha={equals: 2 * method.rank}"]
    done = nodes.run([*submit, *words, *space, "--trials", "8"], cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 trials, tpe, asha; 4 at once" in done.stdout and "acme/searched" in done.stdout
    store = AdapterStore(root / "store")
    assert store.verify(store.resolve("acme/searched")).metrics["search.trials"] == 8


def test_a_submitted_job_is_followed_to_its_own_exit_code_and_holds_no_secret(nodes: NetnsCluster, root: Path) -> None:
    environment = {**nodes.variables(0), "AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET}
    words = [
        "submit",
        "sft",
        str(root / "recipe.yaml"),
        "name=absent",
        "data.sources.0.path=/no/such/rows.jsonl",
        "--address",
        nodes.dashboard,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ftcore.cli", *words], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (3, 5), done.stdout + done.stderr
    assert "/no/such/rows.jsonl" in done.stdout.partition("submitted to")[2].partition("\n")[2], "the job's own log is shown here"
    asked = Request(f"{nodes.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {nodes.token}"})
    record = urlopen(asked, timeout=120).read().decode()
    assert "submitted/recipe.yaml" in record and SECRET not in record and nodes.token not in record


def test_doctor_finds_another_torch_an_unshared_folder_and_a_small_disk_at_once(nodes: NetnsCluster, root: Path) -> None:
    stub = root / "stub" / "torch-9.9.9.dist-info"
    stub.mkdir(parents=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    nodes.kill_node(2)
    nodes.start_node(2, environment={"PYTHONPATH": f"{stub.parent}:{REPO}"}, private=[root / "store"])
    code, problems = doctor(nodes, root, "--min-free-gib", "1000000")
    last = nodes.addresses[2]
    assert code == 3
    assert problems["versions", last].startswith("torch 9.9.9, the driver has ")
    assert f"{root / 'store'}: does not see what" in problems["storage", last]
    assert {check for check, _ in problems} == {"versions", "storage", "disk"}
