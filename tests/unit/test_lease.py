"""One driver a run: the second is told who holds it; a dead one's hold ends; nobody is robbed without finding out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftcore import lease
from ftcore.errors import ConfigError, StorageError
from ftcore.lease import LEASE, Holder, acquire, holding
from ftcore.rundir import RunDir
from ftcore.storage import Folder


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.6)
    monkeypatch.setattr(lease, "LOOK_S", 0.02)
    return RunDir(tmp_path if request.param == "local" else request.getfixturevalue("s3"), "run")


def test_the_second_driver_is_told_who_holds_the_run(run: RunDir) -> None:
    with holding(run), pytest.raises(ConfigError, match=r"held by pid \d+ on .*, since 20") as refused, holding(run):
        pass
    assert run.url in refused.value.where and "name=" in refused.value.remedy


def test_a_run_that_was_given_back_can_be_held_again(run: RunDir) -> None:
    for _ in range(2):
        with holding(run):
            pass
    assert json.loads(run.folder.read(LEASE))["released"]


def test_a_run_is_given_back_after_an_error_too(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), holding(run):
        raise ZeroDivisionError
    assert json.loads(run.folder.read(LEASE))["released"]


def test_the_hold_of_a_killed_process_of_this_machine_ends_at_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    code = f"import os; from ftcore.lease import acquire; from ftcore.storage import Folder; acquire(Folder({run.url!r})); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False, timeout=400)
    assert not json.loads(run.folder.read(LEASE))["released"]
    with holding(run):
        pass


def test_a_driver_of_another_machine_that_does_not_renew_is_taken_over(run: RunDir) -> None:
    run.folder.write(LEASE, elsewhere().to_json())
    said: list[str] = []
    with holding(run, said.append):
        pass
    assert len(said) == 1 and "pid 7 on far" in said[0]


def test_a_driver_of_another_machine_that_renews_is_not(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    holder = elsewhere()
    run.folder.write(LEASE, holder.to_json())
    over = threading.Event()

    def renew() -> None:
        beat = 0
        while not over.wait(0.2):
            beat += 1
            run.folder.write(LEASE, replace(holder, beat=beat).to_json())

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(ConfigError, match="pid 7 on far"), holding(run):
            pass
    finally:
        over.set()
        renewing.join()


@pytest.mark.parametrize("disposition", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_holder_that_was_taken_over_is_interrupted_and_told(run: RunDir, disposition: Any) -> None:
    before, interrupted = signal.signal(signal.SIGINT, disposition), False
    try:
        with pytest.raises(ConfigError, match="took this run over"), holding(run) as held:
            run.folder.write(LEASE, elsewhere().to_json())
            try:
                for _ in range(200):  # short ones: an interrupt that is no signal arrives between two of them
                    time.sleep(0.05)
            except KeyboardInterrupt:
                interrupted = held.lost.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted
    assert json.loads(run.folder.read(LEASE))["host"] == "far"


def test_of_many_who_take_over_at_once_one_wins(run: RunDir) -> None:
    run.folder.write(LEASE, replace(elsewhere(), released=True).to_json())

    def attempt(_: int) -> bool:
        try:
            acquire(run.folder)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, range(6))) == 1


def elsewhere() -> Holder:
    return Holder("token", "far", "another machine", 7, "1", "2026-01-01T00:00:00Z")


def test_a_renewal_whose_answer_was_lost_is_taken_for_what_it_is(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_, lost = Folder.replace, []

    def answer_lost(self: Folder, key: str, old: bytes | None, new: bytes) -> bool:
        kept = replace_(self, key, old, new)
        if len(lost) < 2 or json.loads(new)["released"]:
            lost.append(new)
            raise StorageError("the answer was lost") if len(lost) < 2 else OSError("of a kind nobody foresaw")
        return kept

    monkeypatch.setattr(Folder, "replace", answer_lost)
    with holding(run) as held:
        while held.mine.beat < 4:
            time.sleep(0.02)
        assert len(lost) == 2 and not held.lost.is_set()
    assert json.loads(run.folder.read(LEASE))["released"]
