"""The door to peft lets no compiler in, and what it puts off happens when it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ftcore.lean_imports import compiled_when_called


def test_peft_is_there_without_the_compiler() -> None:
    code = "import sys; import ftcore.lean_imports as lean; print('torch._inductor.compile_fx' in sys.modules, lean.PeftModel.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "PeftModel"]


def test_a_function_is_compiled_at_its_first_call_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)

    @compiled_when_called(dynamic=True)
    def double(value: int) -> int:
        return 2 * value

    assert compiled == []
    assert [double(3), double(value=4)] == [6, 8]
    assert compiled == [{"dynamic": True}]
