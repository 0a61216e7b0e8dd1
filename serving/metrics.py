"""Metrics: what the ingress counts of every request, for Prometheus; and the names and buckets of it.

In: jobs, their events, refusals. Out: figures by tenant and adapter, at most so many of them. Runs in: the ingress.

No client's string becomes a label: tenants come from keys, adapters from the store, codes from this program. Who comes when the table is
full is counted as `_other`, a name that neither a tenant nor an adapter can have; no tenant takes more than half of what the others left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serving.jobs import Closing, Event, Job, Opening, Piece

OTHER = "_other"
PAIR = ("tenant", "adapter")
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class Labels:
    """The pairs that have figures of their own; a pair once given stays until this process ends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}
        self._num_own: dict[str, int] = {}

    def of(self, tenant: str, adapter: str) -> tuple[str, str]:
        """The pair itself, its tenant with `_other`, or `_other` twice."""
        for pair in ((tenant, adapter), (tenant, OTHER)):
            if pair in self._pairs:
                return pair
            own, total = self._num_own.get(tenant, 0), len(self._pairs)
            if total < self._most and (pair[1] == OTHER or own < (self._most - total + own) // 2):
                self._num_own[tenant] = own + 1
                return self._pairs.setdefault(pair, pair)
        return OTHER, OTHER


@dataclass(frozen=True)
class Row:
    """A pair's own figures, looked up once."""

    under_way: Gauge
    first_token: Histogram
    token: Histogram
    request: Histogram
    prompt_tokens: Counter
    completion_tokens: Counter
    cold: Counter
    ended: dict[str, Counter]


@dataclass(eq=False)
class Stamped(Collector):
    """Figures with the name of the ingress that gives them. One address stands for several, and a counter of one must not look like
    another's that fell."""

    collectors: Sequence[Collector | CollectorRegistry]
    ingress: str

    def collect(self) -> Iterator[Metric]:
        for collector in self.collectors:
            for metric in collector.collect():
                metric.samples = [sample._replace(labels={**sample.labels, "ingress": self.ingress}) for sample in metric.samples]
                yield metric


class Metrics:
    """One for each ingress process."""

    def __init__(self, num_labels: int) -> None:
        disable_created_metrics()
        self.registry, self.labels = CollectorRegistry(), Labels(num_labels)
        self._rows: dict[tuple[str, str], Row] = {}

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ftcore_{name}_seconds", what, PAIR, buckets=buckets, registry=self.registry)

        def counter(name: str, what: str, labels: tuple[str, ...] = PAIR) -> Counter:
            return Counter(f"ftcore_{name}", what, labels, registry=self.registry)

        self._first_token = histogram("time_to_first_token", "From admission to the first token.", FIRST_TOKEN_S)
        self._token = histogram("time_per_output_token", "Between two tokens of one answer, its mean.", TOKEN_S)
        self._request = histogram("request", "From admission to the end of an answer.", REQUEST_S)
        self._prompt = counter("prompt_tokens", "Tokens asked.")
        self._completion = counter("completion_tokens", "Tokens answered.")
        self._cold = counter("cold_starts", "Requests whose adapter had to be loaded first.")
        self._ended = counter("requests", "Admitted requests, by how they ended: ok, refused, failed, aborted.", (*PAIR, "outcome"))
        self._refusals = counter("refusals", "Requests refused, by whom they came from and why.", ("tenant", "code"))
        self._under_way = Gauge("ftcore_requests_under_way", "Admitted requests that have not ended.", PAIR, registry=self.registry)

    def refused(self, tenant: str, code: str) -> None:
        """`tenant`: empty where nobody showed a key."""
        self._refusals.labels(self.labels.of(tenant, OTHER)[0] if tenant else "", code).inc()

    def begun(self, job: Job) -> Answer:
        pair = self.labels.of(job.tenant, job.answerer.ref.name if job.answerer.ref is not None else job.answerer.base)
        return Answer(self._rows.get(pair) or self._row(pair), job.num_choices)

    def _row(self, pair: tuple[str, str]) -> Row:
        ended = {outcome: self._ended.labels(*pair, outcome) for outcome in ("ok", "refused", "failed", "aborted")}
        row = self._rows[pair] = Row(
            self._under_way.labels(*pair), self._first_token.labels(*pair), self._token.labels(*pair), self._request.labels(*pair),
            self._prompt.labels(*pair), self._completion.labels(*pair), self._cold.labels(*pair), ended,
        )  # fmt: skip
        return row


class Answer:
    """One request's way through the figures."""

    def __init__(self, row: Row, num_choices: int) -> None:
        self._row, self._num_choices = row, num_choices
        self._began = self._last = time.perf_counter()
        self.first_token_s: float | None = None
        self.opening: Opening | None = None
        self.closing: Closing | None = None
        self.finishes: list[str] = []
        row.under_way.inc()

    def saw(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._last = time.perf_counter()
            if self.first_token_s is None:
                self.first_token_s = self._last - self._began
                self._row.first_token.observe(self.first_token_s)
            if event.finish is not None:
                self.finishes.append(event.finish)
        elif isinstance(event, Opening):
            self.opening = event
            if event.was_cold:
                self._row.cold.inc()
        elif isinstance(event, Closing):
            self.closing = event

    def ended(self, was_aborted: bool) -> str:
        """How it ended, in a word."""
        row, closing = self._row, self.closing
        row.under_way.dec()
        row.request.observe(time.perf_counter() - self._began)
        if closing is not None:
            row.prompt_tokens.inc(closing.prompt_tokens)
            row.completion_tokens.inc(closing.completion_tokens)
            between = closing.completion_tokens / self._num_choices - 1
            if between > 0 and self.first_token_s is not None:
                row.token.observe((self._last - self._began - self.first_token_s) / between)
        outcome = "ok" if closing is not None else "aborted" if was_aborted else "failed" if self.opening is not None else "refused"
        row.ended[outcome].inc()
        return outcome
