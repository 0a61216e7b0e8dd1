"""Hosting: trials that share one frozen base, several to a process: a host trains them, each looked after by an actor of its own.

In: recipes of trials. Out: what each validation came to. Runs in: a host (a Ray actor that holds a worker's CPUs and GPUs), and beside it
the trials' own actors, which hold neither.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from cluster.placement import patience_s
from cluster.runtime_env import worker_variables
from ftcore.data.prepared import Prepared
from ftcore.errors import ClusterError, FtcoreError, Interrupted, TrainingError
from ftcore.recipe import Recipe, Resources, dump_recipe, parse_recipe

Result = dict[str, Any]
ANSWER_S, ASK_AGAIN_S = 10.0, 1.0
"""How long hosts have to answer when one is chosen, and the pause before they are asked again."""


class Host:
    """Trains whoever has begun and not ended; one step of all of them after another, as long as there is any."""

    def __init__(self, recipe: str, plugins: tuple[str, ...], prepared: str, gpus: float) -> None:
        self.recipe, self.plugins, self.prepared, self.device = recipe, plugins, prepared, "cuda" if gpus else "cpu"
        self.loop = asyncio.get_event_loop()
        self.wanted: dict[str, Recipe] = {}
        """Who is to be trained; the thread follows."""
        self.results: dict[str, asyncio.Queue[Result | BaseException]] = {}
        self.ended: BaseException | None = None
        """Why nobody is trained any more."""
        self.changed = threading.Event()
        threading.Thread(target=self._train, name="host", daemon=True).start()

    async def num_guests(self) -> int:
        return len(self.wanted)

    async def begin(self, name: str, recipe: str) -> None:
        self.results[name] = asyncio.Queue()
        self.wanted[name] = parse_recipe(recipe, plugins=self.plugins)
        self._require_going(name)  # after it is wanted: who ends meanwhile either tells it or is seen here
        self.changed.set()

    async def look(self, name: str) -> Result:
        """Waits for the next validation of `name`. Raises what ended it."""
        if self.results[name].empty():
            self._require_going(name)
        found = await self.results[name].get()
        if isinstance(found, BaseException):
            raise found
        return found

    async def end(self, name: str) -> None:
        self.wanted.pop(name, None)
        if name in self.results:
            self.results[name].put_nowait(Interrupted("this trial was ended"))

    def _require_going(self, name: str) -> None:
        if self.ended is not None:
            self.wanted.pop(name, None)
            raise self.ended

    def _train(self) -> None:
        try:
            from ftcore.shared import Shared  # late: loads torch, beside the trials' own start

            base = parse_recipe(self.recipe, plugins=self.plugins)
            while True:
                self._host(Shared(base, Prepared.open(self.prepared), self.device))
                gc.collect()  # the base of a step that failed; it is loaded anew for those that come later
        except BaseException as error:
            self.ended = _told("this base cannot be shared", error)
            self._tell_all(self.ended)
            raise

    def _host(self, shared: Any) -> None:
        """Trains who comes, until a step fails: all that take part in it hear of it."""
        while True:
            self.changed.wait()
            self.changed.clear()
            while self._follow(shared):
                try:
                    stepped = shared.step()
                except Exception as error:
                    self._tell_all(_told("a step of trials that share a base failed", error), shared.candidates)
                    self.changed.set()  # who came meanwhile
                    return
                for name, told in stepped.items():
                    self._take(name, told, over=name not in shared.candidates)

    def _tell_all(self, error: BaseException, names: Iterable[str] | None = None) -> None:
        for name in list(self.wanted if names is None else names):
            self._put(name, error)

    def _follow(self, shared: Any) -> bool:
        """Lets in and out who came and went since the last step. Whether anybody is there."""
        wanted = dict(self.wanted)
        for name in shared.candidates.keys() - wanted.keys():
            shared.drop(name)
        for name in wanted.keys() - shared.candidates.keys():
            try:
                shared.add(name, wanted[name])
            except Exception as error:
                self._put(name, _told("this trial could not begin", error))
        return bool(shared.candidates)

    def _take(self, name: str, told: list[Result] | BaseException, *, over: bool) -> None:
        if isinstance(told, BaseException):
            self._put(name, told)
            return
        latest = {key: value for line in told for key, value in line.items() if isinstance(value, int | float)}
        if any("validation_loss" in line for line in told):
            share = 100.0 if over else round(100 * latest["step"] / latest["num_steps"], 2)
            self._put(name, latest | {"run": "", "share": share} | ({"done": True} if over else {}))
        if over:
            self.wanted.pop(name, None)

    def _put(self, name: str, found: Result | BaseException) -> None:
        if isinstance(found, BaseException):
            self.wanted.pop(name, None)
        queue = self.results.get(name)
        if queue is not None:
            self.loop.call_soon_threadsafe(queue.put_nowait, found)


def _told(what: str, error: BaseException) -> FtcoreError:
    """As a trial's own process can read it, which has no torch."""
    if isinstance(error, FtcoreError):
        return error
    first = next(iter(str(error).splitlines()), "")
    return TrainingError(
        what,
        got=f"{type(error).__name__}: {first}",
        remedy="where memory ran out: fewer at once (together in the search file), or --shared off",
    )


@contextmanager
def hosts(number: int, recipe: Recipe, prepared: Prepared, resources: Resources) -> Iterator[list[ActorHandle[Host]]]:
    """Hosts, each with one worker's CPUs and GPUs, until the body ends; a host that dies is started again."""
    url = str(prepared.folder.path.resolve()) if prepared.folder.is_local else prepared.url
    options: dict[str, Any] = {
        "num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, "max_restarts": -1,
        "runtime_env": {"env_vars": worker_variables(resources)}, "max_concurrency": 1000,
    }  # fmt: skip
    host: Any = ray.remote(**options)(Host)
    started = [host.remote(dump_recipe(recipe), recipe.plugins, url, resources.gpus_per_worker) for _ in range(number)]
    try:
        yield started
    finally:
        for each in started:
            ray.kill(each)


class Together:
    """One trial as a guest of a host."""

    def __init__(self, hosts: list[Any], name: str, recipe: Recipe, max_failures: int) -> None:
        self.hosts, self.name, self.recipe, self.left = hosts, name, recipe, max_failures
        self.host: Any = None
        self.share = 0.0

    def next(self) -> Mapping[str, Any]:
        """The next validation. Where a host died, another or the same one begins it again from its first step: what was told before is
        not told twice."""
        while True:
            try:
                if self.host is None:
                    self.host = self._freest()
                    ray.get(self.host.begin.remote(self.name, dump_recipe(self.recipe)))
                found: Mapping[str, Any] = ray.get(self.host.look.remote(self.name))
            except RayActorError:
                self.host, self.left = None, self.left - 1
                if self.left == -1:
                    raise
                continue
            if found["share"] > self.share:
                self.share = found["share"]
                return found

    def _freest(self) -> Any:
        """The host with the fewest guests, of those that answer. One that died does again when Ray has started it anew: it is waited for,
        as long as a run waits for room. Raises ClusterError when none comes."""
        until = time.monotonic() + patience_s()
        while True:
            asked = {host.num_guests.remote(): host for host in self.hosts}
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
            guests = [(number, asked[answer]) for answer in answered if (number := _number(answer)) is not None]
            if guests:
                return min(guests, key=lambda each: each[0])[1]
            if time.monotonic() > until:
                raise ClusterError(
                    "no host of this search answers", where=self.name, got=f"none of {len(asked)} in {patience_s():g} s",
                    wanted="a worker's CPUs and GPUs for one", remedy="wait longer: FTCORE_PLACEMENT_WAIT_S",
                )  # fmt: skip
            time.sleep(ASK_AGAIN_S)

    def end(self) -> None:
        if self.host is not None:
            self.host.end.remote(self.name)


def _number(answer: Any) -> int | None:
    """None of a host that is not there."""
    try:
        return int(ray.get(answer))
    except RayActorError:
        return None
