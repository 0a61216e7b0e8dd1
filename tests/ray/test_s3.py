"""The main job with every path on s3://: rows, base, blocks, checkpoints, a killed driver, the store; then the same under faults.

The real command in processes of its own, so that what it prints, and all that Ray writes, can be searched for the credentials.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftcore.adapters import AdapterStore
from ftcore.rundir import RunDir
from ftcore.storage import Folder, verify
from tests.ray.small_runs import write_rows
from tests.s3_faults import faulty_proxy, seeded
from tests.s3_server import KEY_ID, SECRET, make_bucket, variables

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """`ftcore sft` with everything in a bucket; `ray` is where its Ray writes."""

    bucket: str
    environment: dict[str, str]
    ray: Path

    def start(self, name: str, endpoint: str = "", **more: str) -> subprocess.Popen[str]:
        places = {
            "model.path": f"{self.bucket}/base", "data.sources.0.path": f"{self.bucket}/rows/*.jsonl",
            "data.cache": f"{self.bucket}/blocks",
            "output.runs": f"{self.bucket}/runs", "output.store": f"{self.bucket}/store", "output.adapter": f"acme/{name}",
        }  # fmt: skip
        small = {"model.dtype": "fp32", "data.max_length": "64", "data.validation": "0.1", "resources.workers": "2", **more}
        words = [f"{key}={value}" for key, value in {"name": name, **places, **small}.items()]
        return subprocess.Popen(
            [sys.executable, "pipelines/sft.py", "pipelines/recipes/sft-lora.yaml", *words], cwd=REPO, text=True,
            env=self.environment | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> str:
        """What it said. A command that hangs is killed."""
        try:
            return process.communicate(timeout=500)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"it did not end:\n{process.communicate()[0]}")

    def run(self, name: str) -> RunDir:
        return RunDir(f"{self.bucket}/runs", name)


STEPS = 30
SHORT = {"optim.max_steps": str(STEPS), "optim.epochs": "100", "optim.batch_size": "4", "output.checkpoint_every": "6"}


@pytest.fixture(scope="module")
def job(s3_endpoint: str, s3_credentials: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    ray = Path(f"/tmp/ft-s3-{os.getpid()}")  # short: sockets live under it
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    here = variables(s3_endpoint, s3_credentials)
    cache, bucket = tmp_path_factory.mktemp("cache"), make_bucket(s3_endpoint, "job")
    more = {"FTCORE_RAY_TMP": str(ray), "FTCORE_CACHE": str(cache), "FTCORE_LOCAL_CPUS": "4", "PYTHONUNBUFFERED": "1"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in here.items():
            patched.setenv(name, value)
        place = Folder(bucket)
        for path in tiny_model_dir.iterdir():
            place.put(path, f"base/{path.name}")
        place.put(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", count=60), "rows/a.jsonl")
        yield Job(bucket, kept | here | more, ray)
    shutil.rmtree(ray, ignore_errors=True)


@pytest.fixture(scope="module")
def said(job: Job) -> str:
    """What two commands said: a driver that was killed after its first sealed checkpoint, and the same command again."""
    first = job.start("whole", **SHORT)
    deadline = time.monotonic() + 400
    while not job.run("whole").checkpoint_steps() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    before, _ = first.communicate()
    again = job.start("whole", **SHORT)
    after = job.finish(again)
    assert again.returncode == 0, before + after
    return before + after


def test_a_killed_driver_goes_on_to_a_promoted_adapter_with_everything_on_s3(job: Job, said: str) -> None:
    store = AdapterStore(f"{job.bucket}/store")
    ref = store.resolve("acme/whole")
    card = store.verify(ref)
    assert (card.world_size, card.base.id) == (2, f"{job.bucket}/base") and "going on after step" in said
    run = job.run("whole")
    verify(run.folder / "final")
    assert {"recipe.yaml", "audit.json", "metrics.jsonl", "report.html", "final"} <= set(run.folder.names())


def test_no_step_is_missing_or_doubled_in_the_remote_journal(job: Job, said: str) -> None:
    lines = [json.loads(line) for line in job.run("whole").folder.read("metrics.jsonl").decode().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.proof
def test_the_same_job_under_faults_ends_with_the_same_losses(job: Job, said: str, s3_endpoint: str) -> None:
    with faulty_proxy(s3_endpoint, seeded(0.15, seed=3)) as proxy:
        process = job.start("faults", proxy.url, **SHORT)
        shown = job.finish(process)
        assert process.returncode == 0, shown
        assert sum(bool(request.fault) for request in proxy.seen) > 10
    losses = []
    for name in ("whole", "faults"):
        lines = [json.loads(line) for line in job.run(name).folder.read("metrics.jsonl").decode().splitlines()]
        losses.append([(line["step"], line["loss"]) for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert AdapterStore(f"{job.bucket}/store").resolve("acme/faults")


def test_the_credentials_are_nowhere(job: Job, said: str, s3: str) -> None:
    """Not in what was printed, in no object (run, card, report, blocks), in nothing that Ray wrote: logs, runtime_envs, job metadata."""
    everything = Folder(job.bucket)
    texts = {"output": said.encode(), **{key: everything.read(key) for key in everything.files()}}
    texts |= {str(path): path.read_bytes() for path in job.ray.rglob("*") if path.is_file() and not path.is_symlink()}
    assert len(texts) > 30
    assert [name for name, text in texts.items() if SECRET.encode() in text or KEY_ID.encode() in text] == []


def test_a_bucket_that_does_not_exist_is_said_before_any_work(job: Job) -> None:
    process = job.start("nowhere", **{"output.runs": "s3://there-is-no-such-bucket/runs"})
    shown = job.finish(process)
    assert process.returncode == 5 and "output.runs cannot be used" in shown and "make the bucket first" in shown, shown
    assert "preparing" not in shown and SECRET not in shown
