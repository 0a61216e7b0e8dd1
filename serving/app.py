"""App: the Ray Serve application. An ingress that authenticates and resolves, replicas that compute, and a router between them.

    serve run serving.app:build base=ftcore/demo/base store=adapters
    ftcore serve [FILE.yaml] base=... store=... [tenants=...]

In: ServeSettings. Out: an OpenAI-compatible endpoint. Runs in: Ray Serve.

The ignored type errors: Ray types its decorators as if they gave back the class or function that they wrap.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ftcore.errors import ConfigError
from serving.api import Service, build_api
from serving.exposure import require_guarded
from serving.gate import Gate
from serving.jobs import SHORT_WAY, Event, Job
from serving.router import AdapterRouter
from serving.settings import Replicas, ServeSettings

if TYPE_CHECKING:
    from serving.replica import Replica

TRIES = 3
"""How many replicas may die before a request is given up."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """The builder for `serve run` and Serve config files; `arguments` are ServeSettings' keys. Where Serve listens then, and with which
    certificate, its own `http_options` say."""
    settings = ServeSettings.model_validate(arguments)
    if settings.tls is not None:
        raise ConfigError(
            "this certificate would not be used", where="tls", remedy="name it in Serve's own http_options: ssl_certfile, ssl_keyfile"
        )
    return application(settings)


def application(settings: ServeSettings) -> serve.Application:
    """Raises ConfigError for what would be unsafe: a door beyond this machine that is open, or of glass."""
    require_guarded(settings, "host", settings.host, has_keys=not settings.is_local_only, make_one="ftcore tenants add FOLDER NAME")
    engines = {
        name: _engine(settings.of(name), "engine" if name == settings.base_name else f"engine-{name}") for name in settings.all_bases
    }
    # what is over the replicas' share is told so, by the handle
    most = sum(2 * base.queue * base.replicas.max for base in settings.all_bases.values()) + 8
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=most,
        max_queued_requests=most,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": settings.ingress.num_cpus, "runtime_env": {"env_vars": SHORT_WAY}},
    )
    return ingress.bind(settings.model_dump(mode="json"), engines)


def _engine(settings: ServeSettings, name: str) -> serve.Application:
    """The replicas of the first base of `settings`."""
    replicas = settings.replicas
    full_at = replicas.target if replicas.min < replicas.max else max(replicas.target, settings.engine.max_batch)
    engine = EngineReplica.options(  # type: ignore[attr-defined]
        **_copies(replicas),
        name=name,
        max_ongoing_requests=settings.queue,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.drain_s,
        request_router_config=_routed(full_at),
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "runtime_env": {"env_vars": SHORT_WAY}},
    )
    return engine.bind(settings.model_dump(mode="json"))


def _routed(full_at: int) -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class=AdapterRouter,  # type: ignore[arg-type]
        request_router_kwargs={"full_at": full_at},
    )


def _copies(replicas: Replicas) -> dict[str, Any]:
    """In Ray Serve's words."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max}
    scaling = AutoscalingConfig(
        min_replicas=replicas.min, max_replicas=replicas.max, target_ongoing_requests=replicas.target,
        upscale_delay_s=replicas.up_after_s, downscale_delay_s=replicas.down_after_s, look_back_period_s=max(11.0, replicas.up_after_s),
    )  # fmt: skip
    return {"num_replicas": "auto", "autoscaling_config": scaling}


@serve.deployment(
    name="engine",
    health_check_period_s=5,
    health_check_timeout_s=30,
)
class EngineReplica:
    """A Replica in an actor of its own."""

    def __init__(self, tree: dict[str, Any]) -> None:
        from serving.replica import Replica  # here, and in no process of the driver or the ingress: it brings torch and transformers

        self._open = partial(Replica.open, ServeSettings.model_validate(tree))
        self._opening: asyncio.Task[Replica] | None = None

    async def _replica(self) -> Replica:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def answer(self, job: Job) -> AsyncGenerator[Event, None]:
        replica = await self._replica()
        async with aclosing(replica.answer(job)) as events:
            async for event in events:
                yield event

    async def state(self) -> dict[str, Any]:
        return (await self._replica()).state()

    async def check_health(self) -> None:
        await (await self._replica()).engine.health()

    async def __del__(self) -> None:
        """Ray Serve calls and awaits it as a replica ends."""
        if self._opening is not None and self._opening.done() and self._opening.exception() is None:
            await self._opening.result().close()


class Handle:
    """One base's deployment as the API sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def answer(self, job: Job) -> AsyncGenerator[Event, None]:
        """A job that a dying replica had not begun to answer goes to another one."""
        for attempt in range(TRIES):
            begun = False
            try:
                async with aclosing(self._answer(job)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except RayActorError:
                if begun or attempt == TRIES - 1:
                    raise
            await asyncio.sleep(0.2 * attempt)

    async def _answer(self, job: Job) -> AsyncGenerator[Event, None]:
        ref = job.answerer.ref
        name = f"{ref.tenant}/{ref.name}" if ref else ""  # not the digest: a new version finds the old one where it goes
        response = self._handle.options(stream=True, multiplexed_model_id=name, _by_reference=False).answer.remote(job)
        ended = False
        try:
            async for event in response:  # type: ignore[union-attr]
                yield event
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def states(self) -> list[dict[str, Any]]:
        """Of every running replica, however full it is. One that ends meanwhile is left out; raises when one does not answer."""
        found = await self._handle.broadcast("state").results_async(return_exceptions=True)
        for state in found:
            if isinstance(state, Exception) and not isinstance(state, RayActorError):
                raise state
        return [state for state in found if not isinstance(state, Exception)]


@serve.deployment(name="ingress")
@serve.ingress(lambda: build_api(_service))
class Ingress:
    """Reads keys and names, then hands jobs on."""

    def __init__(self, tree: dict[str, Any], engines: dict[str, DeploymentHandle]) -> None:
        self.service = Service(Gate(ServeSettings.model_validate(tree)), {name: Handle(engine) for name, engine in engines.items()})
        self._opened: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        if self._opened is None:
            self._opened = asyncio.create_task(self.service.open())
        await asyncio.shield(self._opened)

    async def __del__(self) -> None:
        """Ray Serve calls and awaits it as a replica ends, when the answers under way have ended."""
        if self._opened is not None and self._opened.done() and self._opened.exception() is None:
            await self.service.close()


def _service() -> Service:
    service = serve.get_replica_context().servable_object.service  # type: ignore[attr-defined]
    assert isinstance(service, Service)
    return service
