"""The router: every adapter has a home, homes are shared out evenly, and a replica that goes moves only what was its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from serving.router import AdapterRouter

NAMES = [f"acme/a{number}" for number in range(900)]


def replicas(*names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


def ranked(name: str, among: list[Any], lengths: dict[str, int] | None = None) -> list[list[str]]:
    """Replicas in order of preference, in ranks; 16 requests are all that one is meant to have, `lengths` those known of."""
    pending: Any = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=name))
    router: Any = object.__new__(AdapterRouter)
    router.initialize_state(full_at=16)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: (lengths or {}).get(replica.unique_id))
    found = asyncio.run(router.choose_replicas(among, pending))
    return [[replica.replica_id.unique_id for replica in rank] for rank in found]


def test_an_adapter_has_one_home_wherever_it_is_asked_from_and_the_others_are_second() -> None:
    for name in NAMES[:50]:
        order = ranked(name, replicas("r1", "r2", "r3"))
        assert [len(rank) for rank in order] == [1, 1, 1]
        assert order == ranked(name, replicas("r3", "r1", "r2"))


def test_homes_are_shared_out_and_a_replica_that_goes_moves_only_its_own() -> None:
    three = {name: ranked(name, replicas("r1", "r2", "r3"))[0][0] for name in NAMES}
    shares = Counter(three.values())
    assert all(240 <= shares[replica] <= 360 for replica in ("r1", "r2", "r3")), shares
    two = {name: ranked(name, replicas("r1", "r3"))[0][0] for name in NAMES}
    assert {name for name in NAMES if two[name] != three[name]} == {name for name in NAMES if three[name] == "r2"}


def test_the_bare_base_goes_to_the_less_busy_of_two() -> None:
    (pair,) = ranked("", replicas("r1", "r2", "r3"))
    assert len(set(pair)) == 2
    assert ranked("", []) == []


def test_who_has_all_it_is_meant_to_have_shares_with_the_next_that_has_not() -> None:
    among = replicas("r1", "r2", "r3")
    for name in NAMES[:50]:
        (home,), (second,), (third,) = ranked(name, among)
        assert ranked(name, among, {home: 15, second: 0}) == [[home], [second], [third]]
        assert ranked(name, among, {home: 16}) == [[home, second], [third]]
        assert ranked(name, among, {home: 40, second: 16, third: 3}) == [[home, second, third]]
        assert ranked(name, among, {home: 40, second: 30, third: 20}) == [[home, second, third]]
