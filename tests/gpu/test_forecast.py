"""The forecast against what torch's allocator gave out on a CUDA device in whole runs. Skipped, and saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plan_error import WORST_GOAL, Point, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize(
    "point", [Point("deep", "lora", dtype="bf16", micro_batch=2), Point("wide", "full", tokens=2048)], ids=lambda point: point.method
)
def test_a_run_on_the_device_takes_what_was_forecast(point: Point) -> None:
    said, took = run(point, "exact", "cuda")
    assert said == pytest.approx(took, rel=WORST_GOAL)
