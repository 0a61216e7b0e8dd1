"""Top: what a server did between two looks at its metrics, as a table.

In: two samples of Prometheus' text. Out: lines: the whole, each tenant and adapter, each replica. Runs in: a person's terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from ftcore.card import printable

Key = tuple[str, frozenset[tuple[str, str]]]
FIRST_TOKEN = "ftcore_time_to_first_token_seconds_bucket"


class Sample:
    """The figures of one moment."""

    def __init__(self, at: float, text: str) -> None:
        """`at`: seconds on the clock that both samples of a frame share."""
        self.at = at
        self.values: dict[Key, float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    @property
    def ingress(self) -> str:
        """Which of several behind one address gave it."""
        return next((dict(pairs).get("ingress", "") for _, pairs in self.values), "")

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of a name that have these labels."""
        wanted = set(labels.items())
        return sum(value for (own, pairs), value in self.values.items() if own == name and wanted <= pairs)

    def buckets(self, name: str, labels: Mapping[str, str]) -> dict[float, float]:
        """Upper bound -> how many were at most that long."""
        found: dict[float, float] = {}
        wanted = set(labels.items())
        for (own, pairs), value in self.values.items():
            if own == name and wanted <= pairs:
                bound = float(dict(pairs)["le"])
                found[bound] = found.get(bound, 0.0) + value
        return found

    def each(self, name: str, *labels: str) -> list[dict[str, str]]:
        """The different values of these labels among a name's series, sorted."""
        found = {tuple(dict(pairs)[label] for label in labels) for own, pairs in self.values if own == name}
        return [dict(zip(labels, values, strict=True)) for values in sorted(found)]


def frame(before: Sample, after: Sample) -> Iterator[str]:
    """One screen."""
    seconds = max(1e-9, after.at - before.at)

    def rate(name: str, **labels: str) -> float:
        """Per second; counts from nothing where a replica began anew."""
        now, then = after.sum(name, **labels), before.sum(name, **labels)
        return (now - then if now >= then else now) / seconds

    def row(title: str, **labels: str) -> str:
        middle, slow = (_milliseconds(quantile(_between(before, after, labels), q)) for q in (0.5, 0.95))
        under_way = after.sum("ftcore_requests_under_way", **labels)
        return (
            f"{title:<34} {rate('ftcore_completion_tokens_total', **labels):>9.1f} {rate('ftcore_prompt_tokens_total', **labels):>9.1f} "
            f"{rate('ftcore_requests_total', **labels):>8.2f} {under_way:>6.0f} {middle:>8} {slow:>8}"
        )

    yield f"{'':<34} {'tokens/s':>9} {'prompt/s':>9} {'ended/s':>8} {'now':>6} {'TTFT p50':>8} {'p95':>8}"
    yield row("all")
    for pair in after.each("ftcore_requests_total", "tenant", "adapter"):
        yield row("  " + printable(f"{pair['tenant']}/{pair['adapter']}")[:32], **pair)
    yield ""
    yield from _replicas(after, rate)
    yield f"refused/s {rate('ftcore_refusals_total'):.2f}   store {'AWAY' if after.sum('ftcore_store_away') else 'ok'}"


def _replicas(after: Sample, rate: Callable[..., float]) -> Iterator[str]:
    yield f"{'replica':<24} {'tokens/s':>9} {'running':>8} {'waiting':>8} {'cache':>7} {'reused':>7} {'adapters':>9} {'MiB':>8}"
    for each in after.each("ftcore_rows_running", "replica", "base"):
        room = after.sum("ftcore_cache_capacity_tokens", **each)
        reused, computed = rate("ftcore_engine_reused_prompt_tokens_total", **each), rate("ftcore_engine_prompt_tokens_total", **each)
        full = f"{after.sum('ftcore_cache_tokens', **each) / room:.0%}" if room else "-"
        share = f"{reused / (reused + computed):.0%}" if reused + computed else "-"
        title = printable(f"{each['replica']} {each['base']}")
        yield (
            f"{title:<24.24} {rate('ftcore_engine_tokens_total', **each):>9.1f} {after.sum('ftcore_rows_running', **each):>8.0f} "
            f"{after.sum('ftcore_rows_waiting', **each):>8.0f} {full:>7} {share:>7} {after.sum('ftcore_resident_adapters', **each):>9.0f} "
            f"{after.sum('ftcore_adapter_bytes', **each) / 2**20:>8.1f}"
        )


def _between(before: Sample, after: Sample, labels: Mapping[str, str]) -> dict[float, float]:
    then = before.buckets(FIRST_TOKEN, labels)
    return {bound: value - then.get(bound, 0.0) for bound, value in after.buckets(FIRST_TOKEN, labels).items()}


def quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """By straight lines within a bucket, as Prometheus does it; None where nothing was counted."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    wanted = q * total
    for low, high in pairwise([0.0, *bounds]):
        under = buckets.get(low, 0.0)
        if buckets[high] >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - under) / (buckets[high] - under)
    return None


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
