"""Submitting a job: what travels and what must not, and following it: lost connections, Ctrl-C, exit codes."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import follow, submit
from cluster.follow import DETACHED, Follower
from cluster.submit import as_url, dashboard_of, packed, refuse_secrets, script_of, variables
from ftcore.errors import ClusterError, ConfigError

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "HF_TOKEN": "hf_abcdefghijk",
    "WANDB_API_KEY": "0123456789abcdef",
    "RAY_AUTH_TOKEN": "f" * 64,
}


def test_a_pipeline_is_a_script_of_the_checkout_and_another_word_is_refused_with_the_list() -> None:
    assert script_of("sft") == script_of("pretrain") == ["pipelines/sft.py"]
    with pytest.raises(ConfigError) as refused:
        script_of("sfft")
    assert "sft" in refused.value.wanted and "launch" not in refused.value.wanted


def test_a_committed_recipe_travels_with_the_checkout_and_another_is_sent_along(tmp_path: Path) -> None:
    other = tmp_path / "mine.yaml"
    other.write_text("name: mine\n")
    with ExitStack() as stack:
        folder, named = packed(Path("pipelines/recipes/sft-lora.yaml"), stack)
        assert (Path(folder).is_dir(), named) == (True, "pipelines/recipes/sft-lora.yaml")
        archive, named = packed(other, stack)
        names = set(zipfile.ZipFile(archive).namelist())
    assert {named, "pipelines/sft.py", "ftcore/cli.py"} <= names
    assert not any(name.startswith(("tests/", ".git/")) for name in names)


def test_no_secret_of_ours_is_among_the_variables_of_a_job() -> None:
    sent = variables({**SECRETS, "AWS_ENDPOINT_URL": "http://store:9000", "HOME": "/root"})
    assert sent["AWS_ENDPOINT_URL"] == "http://store:9000" and int(sent["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert not [name for name, value in SECRETS.items() if value in str(sent)] and "HOME" not in sent


@pytest.mark.parametrize(
    "override", ["data.sources.0.path=https://me:hunter2@store/rows.jsonl", f"output.runs=s3://b/{SECRETS['AWS_SECRET_ACCESS_KEY']}"]
)
def test_a_secret_in_the_command_line_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="a secret would stand in the job's record") as refused:
        refuse_secrets([override], SECRETS)
    assert not [value for value in SECRETS.values() if value in str(refused.value)], "the refusal does not tell the secret either"


def test_an_ordinary_command_line_is_no_secret() -> None:
    refuse_secrets(["python pipelines/sft.py r.yaml data.sources.0.path=s3://bucket/rows optim.lr=1e-4"], SECRETS)


def test_nobody_at_the_address_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="no Ray dashboard answers") as refused:
        submit.client_for("http://127.0.0.1:9")
    assert "--dashboard-host" in refused.value.remedy


def test_a_wrong_recipe_is_refused_before_any_cluster_is_asked(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\n")
    with pytest.raises(ConfigError, match="in the recipe"):
        submit.main(["sft", str(recipe), "--address", "http://127.0.0.1:9"])


def test_what_follows_two_dashes_is_the_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    options = submit.parse(["tune", "r.yaml", "optim.lr=1e-4", "--no-wait", "--", "--search", "s.yaml", "--trials", "4"])
    assert (options.overrides, options.no_wait, options.more) == (["optim.lr=1e-4"], True, ["--search", "s.yaml", "--trials", "4"])
    assert submit.parse(["sft", "r.yaml"]).more == []
    with pytest.raises(SystemExit):
        submit.parse(["sft", "r.yaml", "--search", "s.yaml"])
    assert "-- OPTION" in capsys.readouterr().err


def test_the_dashboard_is_on_the_host_that_ray_address_names() -> None:
    assert [dashboard_of(text) for text in ("10.0.0.2:6379", "http://h:1", "auto", "")] == ["http://10.0.0.2:8265", "http://h:1", "", ""]


def test_a_dashboard_is_found_by_what_people_type() -> None:
    typed = ("head:8265", "head", "https://head/ray", "ray://head:10001")
    assert [as_url(text) for text in typed] == ["http://head:8265", "http://head:8265", "https://head/ray", "http://head:8265"]


class Cluster:
    """Stands in for Ray's client: a log in parts, after each of which the connection may be lost."""

    def __init__(self, *parts: str | Exception, status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.parts, self.status, self.code = parts, status, code
        self.tails, self.stops, self.over = 0, 0, False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        lost = 0
        for part in self.parts:
            if isinstance(part, Exception):
                lost += 1
                if lost >= self.tails:
                    raise part
            elif part == "^C":
                if not self.stops or self.tails <= 2:
                    os.kill(os.getpid(), signal.SIGINT)
            else:
                yield part
        self.over = True

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status if self.over else "RUNNING", driver_exit_code=self.code, message="node gone\nmore")

    def refuse(self, job: str) -> None:
        raise ConnectionError("gone")

    def stop_job(self, job: str) -> None:
        self.stops, self.status = self.stops + 1, "STOPPED"

    def get_address(self) -> str:
        return "http://head:8265"


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "RETRY_S", 0.0)
    monkeypatch.setattr(follow, "POLL_S", 0.0)


def followed(cluster: Cluster) -> tuple[int, str]:
    said: list[str] = []
    return Follower(cluster, "job", write=said.append).to_the_end(), "".join(said)


def test_a_lost_connection_is_taken_up_where_the_log_broke_off(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster("one\n", ConnectionError("reset"), "two\n", RuntimeError("WebSocket connection closed"), "three\n")
    assert followed(cluster) == (0, "one\ntwo\nthree\n")
    assert "trying again" in capsys.readouterr().err


def test_a_cluster_that_stays_silent_is_given_up_with_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PATIENCE_S", 0.0)
    cluster = Cluster(*[ConnectionError("gone")] * 50)
    monkeypatch.setattr(cluster, "get_job_info", cluster.refuse)
    with pytest.raises(ClusterError, match="has not answered") as refused:
        followed(cluster)
    assert refused.value.remedy.endswith("ftcore submit --follow job")


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 75, 75), ("FAILED", None, 1), ("STOPPED", None, 75)]
)
def test_the_exit_code_is_the_jobs_own(status: str, code: int | None, expected: int) -> None:
    assert followed(Cluster("x\n", status=status, code=code))[0] == expected


def test_ctrl_c_stops_the_job_and_shows_its_log_to_the_end() -> None:
    cluster = Cluster("step 1\n", "^C", "sealed\n")
    cluster.tails = 1  # one signal only
    assert followed(cluster) == (75, "step 1\nsealed\n") and cluster.stops == 1


def test_a_second_ctrl_c_leaves_the_job_to_itself() -> None:
    cluster = Cluster("step 1\n", "^C", "sealed\n")
    code, said = followed(cluster)
    assert (code, said, cluster.stops) == (DETACHED, "step 1\n", 1)
