"""Replica metrics: the figures that replicas keep themselves, as Prometheus families.

In: the states of all replicas at one moment. Out: families labelled by the replica's id and its base, the same whichever ingress is asked.
Runs in: the ingress.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from ftcore.adapters import split_ref
from serving.metrics import PAIR, Labels
from serving.slots import LOAD_BOUNDS_S
from serving.states import State

REPLICA = ("replica", "base")
GAUGES = {  # name -> (key of the engine's stats, help)
    "rows_running": ("num_running", "Answers in the batch."),
    "rows_waiting": ("num_waiting", "Answers that wait for a place in the batch."),
    "cache_tokens": ("cache_tokens", "Tokens of answers under way whose keys and values are held."),
    "cache_capacity_tokens": ("cache_capacity", "Tokens whose keys and values could be held."),
    "adapter_bytes": ("adapter_bytes", "Memory of loaded adapters."),
}
COUNTERS = {
    "engine_steps": ("num_steps", "Forward passes."),
    "engine_tokens": ("num_tokens", "Tokens drawn."),
    "engine_prompt_tokens": ("num_prompt_tokens", "Prompt tokens computed."),
    "engine_reused_prompt_tokens": ("num_reused_tokens", "Prompt tokens whose keys and values were there already."),
}


@dataclass(eq=False)
class Replicas(Collector):
    """What one scrape shows of the replicas; made anew for each."""

    states: Sequence[State]
    labels: Labels
    num_followed: int
    store_is_away: bool

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("ftcore_replicas", "Replicas that answer.", len(self.states))
        yield GaugeMetricFamily("ftcore_store_away", "1 while the adapter store cannot be read.", int(self.store_is_away))
        yield CounterMetricFamily("ftcore_promotions_followed", "Names seen to point at another version.", self.num_followed)
        for name, (key, what) in GAUGES.items():
            yield self._gauge(name, what, [state["engine"][key] for state in self.states])
        for name, (key, what) in COUNTERS.items():
            yield self._counter(name, what, [state["engine"][key] for state in self.states])
        yield self._counter("versions_refused", "Versions that were not let in.", [state["num_refused"] for state in self.states])
        yield self._counter("swaps", "Versions that came in beside another of their name.", [state["num_swaps"] for state in self.states])
        yield self._gauge("replica_ready", "1 while all that is desired is loaded.", [int(not state["missing"]) for state in self.states])
        yield self._gauge("resident_adapters", "Versions that are loaded.", [len(state["resident"]) for state in self.states])
        waited = SummaryMetricFamily("ftcore_queue_wait_seconds", "What answers waited for a place in the batch.", labels=REPLICA)
        loads = HistogramMetricFamily("ftcore_adapter_load_seconds", "Fetching, checking, loading and proving a version.", labels=REPLICA)
        for state in self.states:
            waited.add_metric(_labels(state), state["engine"]["num_admitted"], state["engine"]["waited_s"])
            bounds = [*map(str, LOAD_BOUNDS_S), "+Inf"]
            loads.add_metric(_labels(state), list(zip(bounds, accumulate(state["loads"]), strict=True)), state["load_s"])
        yield waited
        yield loads
        yield self._residency()

    def _residency(self) -> Metric:
        family = GaugeMetricFamily("ftcore_resident_versions", "Versions of an adapter that a replica holds.", labels=[*REPLICA, *PAIR])
        for state in self.states:
            pairs = Counter(self.labels.of(*split_ref(full)[:2]) for full in state["resident"])
            for pair, count in pairs.items():
                family.add_metric([*_labels(state), *pair], count)
        return family

    def _gauge(self, name: str, what: str, values: Sequence[float]) -> Metric:
        return self._filled(GaugeMetricFamily(f"ftcore_{name}", what, labels=REPLICA), values)

    def _counter(self, name: str, what: str, values: Sequence[float]) -> Metric:
        return self._filled(CounterMetricFamily(f"ftcore_{name}", what, labels=REPLICA), values)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[float]) -> Metric:
        for state, value in zip(self.states, values, strict=True):
            family.add_metric(_labels(state), value)
        return family


def _labels(state: State) -> list[str]:
    return [state["replica"], state["base"]]
