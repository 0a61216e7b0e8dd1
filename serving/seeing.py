"""Seeing: the routes by which operators and their programs look at the server, and the watch over each answer that feeds them.

In: jobs and their events, the states of replicas. Out: /healthz, /readyz (open, and name nobody), /metrics, /status (the metrics key's).
Runs in: the ingress.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from serving.gate import Gate
from serving.homes import Homes
from serving.jobs import Event, Job
from serving.metrics import Metrics, Stamped
from serving.replica_metrics import Replicas
from serving.states import States, reasons
from serving.traces import Asker, Traces

OPEN_ROUTES = ("/healthz", "/readyz")
OPERATOR_ROUTES = ("/metrics", "/status")


class Seeing:
    """One for each ingress process."""

    def __init__(self, gate: Gate, states: States, homes: Homes) -> None:
        settings = gate.settings
        self._gate, self._homes = gate, homes
        self.name = uuid.uuid4().hex[:8]
        self.metrics = Metrics(settings.metrics.labels)
        self.states = states
        self.traces = Traces(settings.otel_endpoint) if settings.otel_endpoint else None

    async def watched(self, job: Job, asker: Asker, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The events as they are; what there is to count of them is counted."""
        answer = self.metrics.begun(job)
        span = self.traces.begin(job, asker) if self.traces is not None else None
        was_aborted = False
        try:
            async with aclosing(events):
                async for event in events:
                    answer.saw(event)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            was_aborted = True
            raise
        finally:
            outcome = answer.ended(was_aborted)
            if self.traces is not None and span is not None:
                self.traces.end(span, answer, outcome)

    async def figures(self) -> bytes:
        """Everything, in Prometheus' text."""
        directory = self._gate.directory
        states = await self.states.now()
        replicas = Replicas(states, self.metrics.labels, directory.num_followed, bool(directory.problem))
        told = CollectorRegistry()
        told.register(Stamped([self.metrics.registry, replicas], self.name))
        return await asyncio.to_thread(generate_latest, told)

    async def readiness(self) -> dict[str, Any]:
        """Whether requests should come; names nobody."""
        states = await self.states.now()
        why = reasons(states, len(self._gate.settings.all_bases))
        why += ["the store was not read yet"] if self._gate.directory.is_blank else []
        store = "away" if self._gate.directory.problem else "ok"
        return {"status": "not ready" if why else "ready", "reasons": why, "replicas": len(states), "store": store}

    async def status(self) -> dict[str, Any]:
        """Which replica holds what, what names mean now and on which base, what was refused and why."""
        picture = self._gate.directory.picture
        desired = {
            f"{tenant}/{name}": {target.digest: target.share for target in known.pointer.targets}
            for tenant, names in picture.tenants.items()
            for name, known in names.items()
        }
        replicas = await self.states.now()
        bases = {ref.full: self._homes.known(ref) for ref in picture.current()}
        return {"replicas": replicas, "desired": desired, "bases": bases, "store": self._gate.directory.problem or "ok"}

    def close(self) -> None:
        if self.traces is not None:
            self.traces.close()


def _require_operator(request: Request) -> None:
    """The door has checked the key. Under a path where it does not know these routes they do not exist."""
    if not getattr(request.state, "is_operator", False):
        raise HTTPException(404)


def add_seeing(api: FastAPI, seeing: Callable[[], Seeing]) -> None:
    @api.get("/healthz")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @api.get("/readyz")
    async def ready() -> Response:
        body = await seeing().readiness()
        return JSONResponse(body, 200 if body["status"] == "ready" else 503)

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        _require_operator(request)
        return Response(await seeing().figures(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/status")
    async def status(request: Request) -> Response:
        _require_operator(request)
        return JSONResponse(await seeing().status())
