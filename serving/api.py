"""API: OpenAI's routes over a Gate and something that answers Jobs. No Ray here: Serve's ingress and the tests both mount this.

In: HTTP. Out: HTTP, server-sent events. Runs in: the ingress.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import ftcore
from ftcore.engines.base import EngineEnded, Sampling
from ftcore.errors import ConfigError, DataError, FtcoreError, IntegrityError, ModelError, StorageError
from serving.audit import AuditLog
from serving.bodies import read_body, replayed, too_large
from serving.gate import Gate, Refusal
from serving.homes import Homes
from serving.jobs import Answerer, Event, Job, Opening
from serving.metering import Account, audit_refusal
from serving.published_keys import PublishedKeys
from serving.quotas import Quotas
from serving.schema import MAX_LOGPROBS, Asked, ChatAsked, EmbeddingsAsked, TextAsked, error_body
from serving.seeing import OPEN_ROUTES, OPERATOR_ROUTES, Seeing, add_seeing
from serving.shapes import Shape, chat_shape, embeddings_body, text_shape
from serving.states import States
from serving.tenants import Caller
from serving.traces import Asker
from serving.turns import Turns

log = logging.getLogger(__name__)
SESSION = "x-ftcore-session"


class Answers(Protocol):
    """What computes on one base: a Serve handle, or a Replica in this process."""

    def answer(self, job: Job) -> AsyncGenerator[Event, None]: ...

    async def states(self) -> list[dict[str, Any]]:
        """Of every replica that can be reached."""


class Service:
    """What the routes work with; made once in the process that serves them."""

    def __init__(self, gate: Gate, answers: Mapping[str, Answers]) -> None:
        """`answers`: by the base's name."""
        self.gate, self.answers = gate, answers
        self.quotas = Quotas(gate.settings.store)
        self.audit = AuditLog(gate.settings.store, gate.settings.audit_spool)
        self.receipt_keys = PublishedKeys(gate.settings.store)
        self.states = States({name: each.states for name, each in answers.items()})
        self.homes = Homes(gate.settings, gate.directory, self.states)
        self.seeing = Seeing(gate, self.states, self.homes)
        self.forms = ThreadPoolExecutor(2, thread_name_prefix="forms")
        """Checks schemas and tools: a second's work for the largest."""
        self.turns = Turns(2)

    async def open(self) -> None:
        await asyncio.to_thread(self.audit.open)
        self.quotas.open()
        await self.gate.open()
        await self.homes.open()

    async def close(self) -> None:
        """Once no answer is under way."""
        self.gate.close()
        await self.homes.close()
        self.forms.shutdown(wait=False)
        self.receipt_keys.close()
        await self.quotas.close()
        await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.seeing.close)


def build_api(service: Callable[[], Service]) -> FastAPI:
    """`service` is called when a request comes: in Ray Serve the routes are made before it exists."""
    api = FastAPI(title="ftcore", version=ftcore.__version__, docs_url=None, redoc_url=None)
    _add_errors(api, service)
    _add_models(api, service)
    add_seeing(api, lambda: service().seeing)

    @api.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        return await _answer(service(), request, asked, asked.prompt, chat_shape)

    @api.post("/v1/completions")
    async def complete(asked: TextAsked, request: Request) -> Response:
        prompt = asked.prompt if isinstance(asked.prompt, str) else tuple(asked.prompt)
        return await _answer(service(), request, asked, prompt, text_shape)

    @api.post("/v1/embeddings")
    async def embed(asked: EmbeddingsAsked, request: Request) -> Response:
        return await _embed(service(), request, asked)

    api.add_middleware(Door, service=service)
    return api


def _add_models(api: FastAPI, service: Callable[[], Service]) -> None:
    @api.get("/v1/models")
    async def models(request: Request) -> Response:
        gate, homes, caller = service().gate, service().homes, request.state.caller
        await homes.learn()
        base = {"object": "model", "created": 0, "owned_by": "ftcore", "parent": None}
        rows = [{**base, "id": name, "root": name} for name in gate.settings.bases_of(caller.tenant)]
        for name, ref in gate.directory.picture.models(caller.tenant):
            asked = f"{ref.tenant}/{name}" if homes.is_hidden(ref) else name
            rows.append({**base, "id": asked, "owned_by": caller.tenant, "root": ref.full, "parent": homes.known(ref) or None})
        return JSONResponse({"object": "list", "data": rows})

    @api.get("/v1/receipt-keys")
    async def keys() -> Response:
        found = await service().receipt_keys.now()
        return JSONResponse({"object": "list", "data": [{"id": key, "pem": pem} for key, pem in sorted(found.items())]})


async def _embed(service: Service, request: Request, asked: EmbeddingsAsked) -> Response:
    caller: Caller = request.state.caller
    name = uuid.uuid4().hex
    answerer = await _found(service, request, caller, asked, name)
    job = Job(name, caller.tenant, answerer, "", None, Sampling(), inputs=asked.inputs)
    opening, events = await _begun(service, request, caller, job, asked.model)
    async with aclosing(events):
        body = embeddings_body([event async for event in events], asked.model, asked.encoding_format)
    return JSONResponse(body, headers=_headers(service, caller, job, opening))


async def _answer(service: Service, request: Request, asked: ChatAsked | TextAsked, prompt: Any, shape: Shape) -> Response:
    caller: Caller = request.state.caller
    name, num_logprobs, limit = uuid.uuid4().hex, asked.num_logprobs, asked.limit
    answerer = await _found(service, request, caller, asked, name)
    if asked.n > caller.limits.max_choices:
        raise Refusal(400, f"n is at most {caller.limits.max_choices}", "invalid_value")
    if limit is not None and limit > caller.limits.max_tokens:
        raise Refusal(400, f"max_tokens is at most {caller.limits.max_tokens}", "invalid_value")
    longest = limit or min(caller.limits.max_tokens, service.gate.settings.all_bases[answerer.base].engine.max_context)
    if num_logprobs is not None and longest * asked.n * (1 + num_logprobs) > MAX_LOGPROBS:
        raise Refusal(400, f"at most {MAX_LOGPROBS} log-probabilities: ask for fewer tokens, choices or alternatives", "invalid_value")
    constraint, tools = None, None
    if asked.has_form:
        with service.gate.uploading(caller):
            constraint, tools = await service.turns.in_thread(caller.tenant, service.forms, asked.form)
    job = Job(
        name, caller.tenant, answerer, prompt, min(limit or caller.limits.max_tokens, caller.limits.max_tokens),
        asked.sampling(num_logprobs), asked.stops, asked.n, constraint, tools, is_streamed=asked.stream,
    )  # fmt: skip
    opening, events = await _begun(service, request, caller, job, asked.model)
    headers = _headers(service, caller, job, opening)
    fingerprint = f"{opening.base[:12]}-{opening.adapter.rpartition('@')[2][:12] or 'base'}"
    writer = shape(job.id, asked.model, int(time.time()), fingerprint)
    if not asked.stream:
        async with aclosing(events):
            body = writer.whole([event async for event in events])
        return JSONResponse(body, headers=headers)
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    return StreamingResponse(_sse(writer.stream(events, usage), job.id), media_type="text/event-stream", headers=headers)


async def _found(service: Service, request: Request, caller: Caller, asked: Asked | EmbeddingsAsked, job: str) -> Answerer:
    """What that model's name means to this caller: to a session always the same. Raises Refusal, and what `Homes.answerer` does."""
    session = request.headers.get(SESSION, "")[:256] or asked.user or job
    ref = service.gate.find(caller, asked.model, session)
    if ref is None:
        return Answerer(asked.model)
    return await service.homes.answerer(ref, service.gate.directory.picture.before(ref) if "@" not in asked.model else None)


async def _begun(
    service: Service, request: Request, caller: Caller, job: Job, model: str
) -> tuple[Opening, AsyncGenerator[Event, None]]:  # fmt: skip
    """The first event and the rest. Whatever refuses does so here, before a header is sent."""
    request.state.job = job.id
    events = _admitted(service, caller, job, Asker(model, request.headers.get("traceparent", "")[:64]))
    try:
        opening = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    assert isinstance(opening, Opening)
    return opening, events


def _headers(service: Service, caller: Caller, job: Job, opening: Opening) -> dict[str, str]:
    headers = {"x-ftcore-request": job.id, "x-ftcore-base": opening.base, "x-ftcore-adapter": opening.adapter, "cache-control": "no-store"}
    cold = {"x-ftcore-cold": "1"} if opening.was_cold else {}
    return headers | {"x-ftcore-replica": opening.replica} | cold | service.quotas.headers(caller)


async def _admitted(service: Service, caller: Caller, job: Job, asker: Asker) -> AsyncGenerator[Event, None]:
    """A job's events, in one of the tenant's places, on its account, and watched."""
    bases = service.gate.settings.all_bases
    max_context = max(bases[each.base].engine.max_context for each in (job.answerer, job.answerer.elsewhere) if each)
    account = Account(service.quotas, service.audit, caller, job, max_context)
    begun = _begun_within(service.gate.settings.begin_s, _computed(service.answers, job))
    try:
        with service.gate.places(caller, job.num_choices):
            await account.begin()
            async with aclosing(service.seeing.watched(job, asker, begun)) as events:
                async for event in events:
                    await account.saw(event)
                    yield event
    except Exception as error:
        refusal = _refusal(error)
        account.failed(refusal)
        raise refusal from error
    finally:
        account.end()


async def _begun_within(begin_s: float, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The same events. Raises Refusal where the first takes longer."""
    async with aclosing(events):
        try:
            async with asyncio.timeout(begin_s):
                first = await anext(events)
        except TimeoutError:
            raise Refusal(503, "no replica could begin this in time", "overloaded", kind="server_error", retry_after_s=5) from None
        yield first
        async for event in events:
            yield event


async def _computed(answers: Mapping[str, Answers], job: Job) -> AsyncGenerator[Event, None]:
    """What its base answers; where that refuses the version, what the base of the version before it does."""
    other, begun = job.answerer.elsewhere, False
    try:
        async with aclosing(answers[job.answerer.base].answer(job)) as events:
            async for event in events:
                begun = True
                yield event
        return
    except Exception as error:
        if other is None or begun or _refusal(error).code != "adapter_refused":
            raise
    async with aclosing(answers[other.base].answer(replace(job, answerer=other))) as events:
        async for event in events:
            yield event


async def _sse(bodies: AsyncGenerator[dict[str, Any], None], job: str) -> AsyncIterator[bytes]:
    async with aclosing(bodies):
        try:
            async for body in bodies:
                yield b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
        except Exception as error:  # the status was sent: the stream itself has to say it
            refusal = _refusal(error)
            log.warning("request %s ended in the middle: %s", job, refusal.message)
            yield b"data: " + json.dumps(error_body(refusal.message, refusal.kind, refusal.code)).encode() + b"\n\n"
            return
        yield b"data: [DONE]\n\n"


class Door:
    """Pure ASGI, before anything is looked up: who asks, and how much they send, and how slowly."""

    def __init__(self, app: Any, service: Callable[[], Service]) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in OPEN_ROUTES:  # nobody's: their body is not read
            await self._app(scope, receive, send)
            return
        request, gate = Request(scope), self._service().gate
        try:
            client, name = (scope.get("client") or ("",))[0], urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
            key, state = request.headers.get("authorization"), scope.setdefault("state", {})
            if scope["path"] in OPERATOR_ROUTES:  # they read no body either
                gate.operator(key, client, name)
                state["is_operator"] = True
                await self._app(scope, receive, send)
                return
            caller = state["caller"] = gate.caller(key, client, name)
            length = request.headers.get("content-length", "0")
            if not (length.isascii() and length.isdigit()) or int(length) > gate.settings.max_body_kib << 10:
                raise too_large(gate.settings.max_body_kib)
            with gate.uploading(caller):
                body = await read_body(receive, gate.settings.max_body_kib, gate.settings.body_s)
        except Refusal as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self._app(scope, replayed(body, receive), send)

    async def _refuse(self, refusal: Refusal, scope: Any, receive: Any, send: Any) -> None:
        self._service().seeing.metrics.refused(_tenant(Request(scope)), refusal.code)
        await _refused(refusal)(scope, receive, send)


def _add_errors(api: FastAPI, service: Callable[[], Service]) -> None:
    def told(request: Request, code: str) -> None:
        service().seeing.metrics.refused(_tenant(request), code)
        state = request.scope.get("state", {})
        if "caller" in state and "job" not in state:  # a job's account is audited where it ends
            audit_refusal(service().audit, state["caller"], uuid.uuid4().hex, code)

    @api.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        told(request, refusal.code)
        return _refused(refusal)

    @api.exception_handler(FtcoreError)
    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, _refusal(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told(request, "invalid_request")
        problems = error.errors()
        first = problems[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"
        return JSONResponse(error_body(message[:500], "invalid_request_error", str(first["type"]), where or None), 400)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        told(request, f"http_{error.status_code}")
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, headers=error.headers)


def _tenant(request: Request) -> str:
    """Whose key came with a request; empty when none was good."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller.tenant if caller is not None else ""


def _refusal(error: BaseException) -> Refusal:
    """What a client is told; the server's own troubles go to the log, not to them."""
    cause = getattr(error, "cause", None)  # Ray wraps what a replica raised
    if isinstance(cause, FtcoreError):
        error = cause
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ConfigError | DataError):
        text = error.what + (f" (got {error.got}, wanted {error.wanted})" if error.wanted else "")
        return Refusal(400, text[:500], "invalid_value")
    if isinstance(error, EngineEnded):
        return Refusal(503, "the engine that would answer has ended", "engine_ended", kind="server_error", retry_after_s=1)
    if isinstance(error, IntegrityError | ModelError):
        return Refusal(409, f"this adapter is not served: {error.what}"[:500], "adapter_refused", kind="adapter_error")
    if isinstance(error, StorageError):
        return Refusal(503, "the adapter store cannot be reached", "store_unavailable", kind="server_error", retry_after_s=5)
    ray = {kind.__name__ for kind in type(error).__mro__}  # this file imports none of it
    if ray & {"RayActorError", "AioRpcError"}:  # the second: one that went down with its replica
        return Refusal(503, "the replica that was to answer has ended: ask again", "replica_ended", kind="server_error", retry_after_s=1)
    if "BackPressureError" in ray:
        return Refusal(503, "no replica can take this request now", "overloaded", kind="server_error", retry_after_s=1)
    log.error("unexpected: %s", type(error).__name__, exc_info=error)
    return Refusal(500, "the server made a mistake", "internal_error", kind="server_error")


def _refused(refusal: Refusal) -> Response:
    headers = dict(refusal.headers)
    if refusal.status == 408:
        headers["connection"] = "close"
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal.message, refusal.kind, refusal.code), refusal.status, headers=headers)
