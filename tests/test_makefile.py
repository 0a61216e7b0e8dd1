"""`make` on a bare machine: it says what is missing, passes on what it is given, and installs again only when what is wanted changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, folder: Path = REPO) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # `make test` runs this
    return subprocess.run(["make", *arguments], cwd=folder, env=outer, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout in which nothing was made yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def test_make_alone_explains_itself_and_makes_nothing(bare: Path) -> None:
    done = make(folder=bare)
    assert "make demo" in done.stdout and not (bare / ".venv").exists()


def test_a_python_that_is_too_old_is_told_before_anything_is_made(bare: Path) -> None:
    done = make("demo", "PYTHON=false", folder=bare)
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stdout and not (bare / ".venv").exists()


def test_what_was_installed_is_not_installed_again(bare: Path) -> None:
    commands = make("-n", "demo", folder=bare).stdout
    assert "-m venv" in commands and "pip install" in commands
    venv = bare / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / re.findall(r"\.installed-demo-[\d-]+", commands)[-1]).touch()
    assert "pip install" not in make("-n", "demo", folder=bare).stdout
    (bare / "constraints.txt").write_text("torch==1.0\n")
    assert "pip install" in make("-n", "demo", folder=bare).stdout


def test_the_demo_installs_nothing_that_only_developers_need(bare: Path) -> None:
    assert "pytest" not in make("-n", "demo", folder=bare).stdout and ",dev" not in make("-n", "demo", folder=bare).stdout
    assert ",dev]" in make("-n", "test", folder=bare).stdout


def test_history_and_model_are_passed_on() -> None:
    command = make("-n", "demo", "HISTORY=a b.txt", "MODEL=org/name").stdout.splitlines()[-1]
    assert '--history "a b.txt"' in command and '--model "org/name"' in command


def test_a_home_folder_in_history_is_opened() -> None:
    assert f'--history "{Path.home()}/.bash_history"' in make("-n", "demo", "HISTORY=~/.bash_history").stdout


def test_every_dependency_is_pinned() -> None:
    """What pyproject.toml asks for by name has an exact version in constraints.txt, the optional trackers and vLLM apart."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name not in ("tracking", "vllm") for line in lines]
    wanted = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in [*project["dependencies"], *extras]}
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line}
    assert wanted <= pinned


def test_pins_carry_no_local_label() -> None:
    """`+cpu` would refuse every other build of the same version."""
    assert [line for line in (REPO / "constraints.txt").read_text().splitlines() if "+" in line.split("#")[0]] == []
