"""Where the next group of workers goes when a node is taken away: elsewhere, or not at all, or where another comes in its place."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.placement import Place
from cluster.resources import Node
from ftcore.errors import Interrupted
from ftcore.recipe import Resources
from pipelines import lead
from pipelines.lead import Lead

ALONE = Node("10.0.0.1", 2, 0, id="going")


def leading(monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> Lead:
    """A run whose only node is to be left."""
    monkeypatch.setattr(lead, "alive_nodes", lambda: [ALONE])
    monkeypatch.setattr(lead, "place", lambda resources, say, **how: (asked.append(how), Place(1, ()))[1])
    run = Lead(lambda post: None, Resources(workers=1), None, name="a", hear=lambda event: None, logs="")  # type: ignore[arg-type]
    run.avoid, run.group_number = {"going"}, 1
    return run


def test_a_run_whose_last_node_is_taken_away_ends_and_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_KUBERAY_IN_USE", raising=False)
    asked: list[dict[str, Any]] = []
    with pytest.raises(Interrupted, match="no others have room"):
        leading(monkeypatch, asked)._place()
    assert not asked


def test_in_kuberays_pods_it_waits_for_the_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    asked: list[dict[str, Any]] = []
    assert leading(monkeypatch, asked)._place() == Place(1, ())
    [how] = asked
    assert how["avoid"] == {"going"} and how["again"], "not the one that goes, and as long as a node may take to come back"
