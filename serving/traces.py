"""Traces: one OpenTelemetry span for each request, in the names of the GenAI conventions; no prompt, no answer, no key.

In: jobs and how they ended. Out: spans, sent by OTLP over HTTP in the background. Runs in: the ingress, where `otel_endpoint` is set.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore.data.types import Message
from ftcore.errors import ConfigError
from serving.jobs import Job
from serving.metrics import Answer

if TYPE_CHECKING:
    from opentelemetry.trace import Span

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Asker:
    """What a trace needs of a request beside its job."""

    model: str
    traceparent: str
    """W3C's header, as it came; empty when it did not."""


class Traces:
    """Spans go to one collector; those of the last half second are sent by `close`."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError("traces need a package that is not installed", got=str(error), remedy="pip install 'ftcore[otel]'") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ftcore"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint), schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer("ftcore")

    def begin(self, job: Job, asker: Asker) -> Span:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        sound = TRACEPARENT.fullmatch(asker.traceparent)
        parent = TraceContextTextMapPropagator().extract({"traceparent": asker.traceparent}) if sound else None
        is_chat = isinstance(job.prompt, tuple) and isinstance(job.prompt[0], Message)
        operation = "chat" if is_chat else "text_completion"
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "ftcore", "gen_ai.request.model": asker.model,
            "gen_ai.request.choice.count": job.num_choices, "gen_ai.request.temperature": job.sampling.temperature,
            "gen_ai.request.top_p": job.sampling.top_p, "gen_ai.response.id": job.id, "ftcore.tenant": job.tenant,
        }  # fmt: skip
        if job.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = job.max_tokens
        return self._tracer.start_span(f"{operation} {asker.model}", context=parent, kind=SpanKind.SERVER, attributes=attributes)

    def end(self, span: Span, answer: Answer, outcome: str) -> None:
        from opentelemetry.trace import StatusCode

        if answer.opening is not None:
            span.set_attribute("gen_ai.response.model", answer.opening.adapter or answer.opening.base)
            span.set_attribute("ftcore.replica", answer.opening.replica)
            span.set_attribute("ftcore.cold", answer.opening.was_cold)
        if answer.first_token_s is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", answer.first_token_s)
        if answer.closing is not None:
            span.set_attribute("gen_ai.usage.input_tokens", answer.closing.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", answer.closing.completion_tokens)
            span.set_attribute("gen_ai.response.finish_reasons", answer.finishes)
        span.set_attribute("ftcore.outcome", outcome)
        if outcome != "ok":
            span.set_attribute("error.type", outcome)
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        self._provider.shutdown()
