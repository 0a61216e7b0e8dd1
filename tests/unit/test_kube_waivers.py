"""A warning is waived with a reason, in the object itself; an error never, and no waiver lies."""

from __future__ import annotations

import pytest

from cluster.kube.documents import Document, parse
from cluster.kube.flaws import Flaw, Level
from cluster.kube.waivers import waived

TEXT = """\
kind: Service
apiVersion: v1
metadata:
  name: a
  annotations:
    ftcore/waive: "WAIVER"
"""


def judged(waiver: str, *levels: Level) -> tuple[list[str], list[str]]:
    """(What is left, what is told) of flaws of these levels, all of the rule `selects-nothing`."""
    [document] = [found for found in parse(TEXT.replace("WAIVER", waiver), "a.yaml") if isinstance(found, Document)]
    flaws = [
        document.flaw("selects-nothing", "spec.selector", got=number, wanted="pods", level=level) for number, level in enumerate(levels)
    ]
    left, told = waived([document], flaws)
    return [f"{flaw.level} {flaw.rule}:{flaw.line}" for flaw in left], told


def test_a_warning_with_a_reason_is_told_and_gone() -> None:
    assert judged("selects-nothing: the gateway makes them", "warning", "warning") == (
        [], ["waived: Service/a selects-nothing x 2: the gateway makes them"],
    )  # fmt: skip


def test_an_error_stays() -> None:
    left, told = judged("selects-nothing: why not", "error")
    assert "error selects-nothing:1" in left and not told


@pytest.mark.parametrize("waiver", ["selects-nothing", "selects-nothing:", "selects-nothing: ; "])
def test_a_waiver_without_a_reason_waives_nothing_and_is_told_itself(waiver: str) -> None:
    left, told = judged(waiver, "warning")
    assert left == ["warning waiver:6", "warning selects-nothing:1"] and not told


def test_a_waiver_that_waives_nothing_is_told() -> None:
    assert judged("missing-secret: made by hand") == (["warning waiver:6"], [])


def test_a_waiver_is_for_its_own_object_alone() -> None:
    [document] = [found for found in parse(TEXT.replace("WAIVER", "selects-nothing: so"), "a.yaml") if isinstance(found, Document)]
    other = Flaw("warning", "selects-nothing", "b.yaml", 1, "Service/a", "spec.selector", "0", "pods")
    left, _ = waived([document], [other])
    assert other in left
