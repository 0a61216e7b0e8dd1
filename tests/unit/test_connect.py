"""Which Ray a process joins; what it is told when none answers; what an upload leaves at home."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.connect import Connection, connect, local_num_cpus
from cluster.runtime_env import checkout, code_for_here, inside_job
from ftcore.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**variables, "PYTHONPATH": str(REPO), **environment}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.ray
def test_inside_a_ray_of_somebody_else_connect_joins_and_close_leaves_it_alone(local_ray: None) -> None:
    import ray

    connection = connect(log=lambda line: None)
    connection.close()
    assert (connection.kind, connection.cpus, ray.is_initialized()) == ("joined", 8.0, True)


@pytest.mark.ray
def test_without_a_cluster_a_ray_of_our_own_starts_in_a_folder_of_our_own(tmp_path: Path) -> None:
    short = Path("/tmp") / f"ft-{os.getpid()}"  # sockets live under it: pytest's own folders are too long
    code = (
        "from cluster.connect import connect, connect_early; connect_early(); c = connect(); c2 = connect();"
        "import ray; print(c is c2, c.kind, c.cpus, c.logs);"
        "print(ray.get(ray.remote(lambda: __import__('ftcore').__file__).remote())); c.close()"
    )
    try:
        done = in_fresh_process(code, FTCORE_LOCAL_CPUS="3", FTCORE_RAY_TMP=str(short))
    finally:
        subprocess.run(["rm", "-rf", str(short)], check=True)
    said = done.stdout.splitlines()
    assert said[0].startswith("ray: a Ray of our own on this machine at ") and said[0].endswith("(1 node, 3 CPUs)"), done.stderr
    assert said[1].startswith(f"True local 3.0 {short}/session_")
    assert said[2] == str(REPO / "ftcore/__init__.py")


def test_a_cluster_that_does_not_answer_is_named_with_what_to_do() -> None:
    code = (
        "from cluster.connect import connect\nfrom ftcore.errors import ClusterError\n"
        "try: connect()\nexcept ClusterError as e: print(e.where, '|', e.remedy)"
    )
    done = in_fresh_process(code, RAY_ADDRESS="127.0.0.1:1")
    assert done.stdout.startswith("RAY_ADDRESS=127.0.0.1:1 | start it, correct RAY_ADDRESS"), done.stdout + done.stderr


def test_a_connection_says_itself_in_one_line() -> None:
    text = str(Connection("cluster", "10.0.0.1:6379", nodes=2, cpus=16, gpus=2, logs="/logs"))
    assert text == "the running Ray cluster at 10.0.0.1:6379 (2 nodes, 16 CPUs, 2 GPUs)"


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_a_silly_number_of_local_cpus_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCORE_LOCAL_CPUS", asked)
    with pytest.raises(ConfigError, match="FTCORE_LOCAL_CPUS"):
        local_num_cpus()


def test_a_process_outside_a_job_knows_it() -> None:
    assert not inside_job()


def test_the_checkout_is_put_on_pythonpath_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code_for_here()
    code_for_here()
    assert os.environ["PYTHONPATH"] == f"{checkout()}{os.pathsep}/elsewhere"


def test_an_upload_carries_the_rooms_and_leaves_runs_tests_and_adapters_at_home(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    for name in (
        "ftcore/a.py",
        "pipelines/recipes/r.yaml",
        "runs/x/final/adapter_model.safetensors",
        "adapters/a",
        "prepared/b",
        "tests/t.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".rayignore").write_bytes((REPO / ".rayignore").read_bytes())
    package = tmp_path.with_suffix(".zip")
    create_package(str(tmp_path), package, include_gitignore=True)
    files = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert files == {".rayignore", "ftcore/a.py", "pipelines/recipes/r.yaml"}
