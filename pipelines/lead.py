"""Lead: the driver's side of a run on Ray Train: groups of workers, one after another, until the work is done or must end.

    place -> group (Ray Train) -> generation -> generation -> ...      a killed worker: the next generation, in the same group
      ^                                             |                   a lost node or seat, a drained node, more room: the next group
      '---------------------------------------------'

In: the work, the recipe's resources, what seats say. Out: rank 0's value, or the error that ends the run. Runs in: the driver.

Decisions, each said in the log: a failure costs one of `resources.max_failures`; a notice that a machine goes and a group that grows
cost none, lose no step, and begin with a checkpoint at the next step boundary.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import remove_placement_group

from cluster.outbox import Message
from cluster.placement import Place, draining_nodes, gone, look, place
from cluster.relay import Orders, Relay
from cluster.resources import alive_nodes, fits, in_pods
from cluster.worker_logs import WorkerPlace, laid_out, why_it_died
from ftcore.errors import ClusterError, Interrupted
from ftcore.nursery import Post
from ftcore.recipe import Resources
from pipelines.causes import explained, headline, is_death, is_lost_peer, of_ray_train, root_cause, would_happen_again
from pipelines.trainer import trainer

POLL_S = 0.1
SETTLE_S = 0.3
"""Errors of one failure arrive together, within this."""
LOST_PEER_S = 15.0
"""When every error is a lost connection, the one who was lost says nothing: Ray Train or a look at the nodes tells within this."""
LOOK_EVERY_S = 1.0
NUM_MISSED = 3
"""A node that does not answer this many looks in a row is gone, whatever Ray still believes."""
GROW_EVERY_S, GROW_NOT_BEFORE_S = 5.0, 20.0
LEAVE_S = 20.0
EMPTY_STARTS = 3
"""Groups in a row that may find the room they saw taken; such a start costs no failure."""
Hear = Callable[[Message], None]


@dataclass
class Group:
    """One group of workers: what is known of it while it lasts."""

    at: Place
    started: float = field(default_factory=time.monotonic)
    nodes: dict[int, str] = field(default_factory=dict)
    """Rank -> Ray's id of the node it sits on."""
    ended: dict[int, BaseException | None] = field(default_factory=dict)
    """Rank -> error of this generation's workers that ended."""
    failed_at: float = 0.0
    controller: Any = None
    room: Any = None
    """Its placement group."""
    abandoned: bool = False
    trained: bool = False
    arrived: set[int] = field(default_factory=set)
    told: bool = False
    missed: dict[str, int] = field(default_factory=dict)
    looked: float = 0.0
    grow_looked: float = 0.0
    room_seen: int = 0


class Lead:
    """Leads one run. `through` is called once."""

    def __init__(self, work: Callable[[Post], Any], resources: Resources, relay: Relay, *, name: str, hear: Hear, logs: str) -> None:
        self.work, self.resources, self.relay, self.name, self.hear, self.logs = work, resources, relay, name, hear, logs
        self.preload: tuple[str, ...] = ()
        self.workers: dict[int, WorkerPlace] = {}
        self.num_failures = self.num_empty_starts = 0
        self.group_number = self.generation = 0
        self.avoid: set[str] = set()
        self.why = ""
        """Why the workers were asked to stop: "" (they were not), user, going, growing."""
        self.grown: tuple[int, frozenset[str]] | None = None
        """Size and nodes when this run last stopped to grow: if that gave no larger group, only other nodes make it try again."""
        self.fatal: BaseException | None = None
        self.stopped: Interrupted | None = None
        self.asked = threading.Event()

    def stop(self) -> None:
        """The user wants the run to end, with a checkpoint. Called by a signal's handler, which must do no more than this."""
        self.asked.set()

    def _heed(self) -> bool:
        """Passes the user's wish on, once. Whether it was there."""
        if self.asked.is_set() and self.why != "user":
            self.why = "user"
            self.relay.ask_to_stop()
            self.hear({"event": "stopping"})
        return self.asked.is_set()

    def through(self) -> Any:
        while True:
            group = Group(self._place())
            if self.group_number:
                self.hear({"event": "group", "size": group.at.num_workers})
            over, value = self._lead(group)
            if over:
                return value
            if self.why == "user":
                raise self.stopped or Interrupted("stopped while its workers were being replaced")
            self.why = ""

    def _place(self) -> Place:
        """Room for the next group. Raises Interrupted when all there is will be taken away, and nobody puts other nodes in its place."""
        if self.avoid and not in_pods():
            staying = [node for node in alive_nodes() if node.id not in self.avoid]
            if fits(self.resources, staying) < self.resources.min_workers:
                raise self.stopped or Interrupted("the machines of this run are being taken away, and no others have room for it")
        try:
            return place(
                self.resources, lambda text: self.hear({"event": "waiting", "text": text}),
                avoid=self.avoid, again=self.group_number > 0, stopped=self._heed,
            )  # fmt: skip
        except ClusterError as error:
            if self.why == "user":
                raise Interrupted("stopped while it waited for room") from error
            raise

    def _lead(self, group: Group) -> tuple[bool, Any]:
        """(True, value) when the work is done, (False, None) when another group should go on. Raises what ends the run."""
        self.group_number += 1
        self.stopped = None
        value: list[Any] = []
        error: list[BaseException] = []

        def run(scratch: str) -> None:
            try:
                value.append(self._trainer(group.at, scratch).fit().return_value)
            except BaseException as raised:  # carried to the waiting thread
                error.append(raised)

        # Ray Train's own notes go to a scratch folder: our state is in the run folder. It takes Ctrl-C for itself in the main thread.
        with tempfile.TemporaryDirectory(prefix="ftcore-train-", ignore_cleanup_errors=True) as scratch:
            self._next_generation(group)
            thread = threading.Thread(target=run, args=(scratch,), name="ray-train", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(POLL_S)
                self._heed()
                self._drain(group)
                self._judge(group)
                self._watch(group)
            self._drain(group)
        if self.fatal is not None:
            raise self.fatal
        if error:
            self._lost(group, error[0])
        elif self.stopped is None and not group.abandoned:
            return True, value[0]
        return False, None

    def _trainer(self, at: Place, scratch: str) -> Any:
        order = {
            "work": self.work, "relay": self.relay, "cwd": str(Path.cwd()), "group": self.group_number,
            "preload": self.preload, "gpus": self.resources.gpus_per_worker,
        }  # fmt: skip
        return trainer(order, self.relay, self.resources, at, name=self.name, scratch=scratch)

    def _next_generation(self, group: Group) -> None:
        self.generation += 1
        group.ended.clear()
        group.failed_at = 0.0
        self.workers = {}
        self.relay.command(Orders(self.group_number, self.generation, stop=bool(self.why)))

    def _over(self) -> None:
        self.relay.command(Orders(self.group_number, self.generation, over=True))

    def _drain(self, group: Group) -> None:
        try:
            messages = self.relay.drain()
        except RayError:
            return  # the cluster is going away; the run's own error says why
        for message in messages:
            self._take(group, message)

    def _take(self, group: Group, message: Message) -> None:
        event = message["event"]
        if event == "controller" and message["group"] == self.group_number:
            group.controller = message["actor"]
        elif event == "room" and message["group"] == self.group_number:
            group.room = message["placement"]
        elif event == "seated":
            self.num_empty_starts = 0
            group.nodes[message["rank"]] = message["node_id"]
        elif event == "worker":
            self._arrived(group, message)
        elif event == "lines":
            group.trained = True
            self.hear(message)
        elif event == "notice":
            self._leave_nodes(group, {group.nodes.get(message["rank"], "")}, message["why"])
        elif event == "ended" and message["generation"] == self.generation:
            error = ray.cloudpickle.loads(message["error"])
            group.ended[message["rank"]] = error
            group.failed_at = group.failed_at or (time.monotonic() if error is not None else 0.0)

    def _arrived(self, group: Group, message: Message) -> None:
        """A worker began; the last one of a group's first generation lets the driver say who is where."""
        rank = message["rank"]
        self.workers[rank] = WorkerPlace(message["node"], group.nodes.get(rank, ""), message["pid"])
        self.hear(message)
        group.arrived.add(rank)
        if len(group.arrived) == group.at.num_workers and not group.told:
            group.told = True
            self.hear({"event": "note", "text": laid_out({rank: self.workers[rank] for rank in group.arrived})})

    def _judge(self, group: Group) -> None:
        """Decides what follows from workers that ended, once enough of them have."""
        if not group.ended or self.fatal is not None or self.stopped is not None or group.abandoned:
            return
        everyone = len(group.ended) == group.at.num_workers
        failures = {rank: error for rank, error in group.ended.items() if error is not None}
        if not failures:
            if everyone:
                self._over()
            return
        rank, cause = root_cause(failures)
        patience = LOST_PEER_S if is_lost_peer(cause) else LEAVE_S if isinstance(cause, Interrupted) else SETTLE_S
        if not everyone and time.monotonic() - group.failed_at < patience:
            return
        if isinstance(cause, Interrupted) and self.why:
            self.stopped = cause
            self._over()
            return
        where = self.workers.get(rank)
        if self._may_go_on(cause):
            if gone(set(group.nodes.values())):
                self._abandon(group)
            else:
                self._next_generation(group)  # first: reading a dead worker's log takes a second
        self._tell_failure(rank, cause, where)

    def _count(self, rank: int, cause: BaseException) -> bool:
        """Whether the run may go on after this failure; says so. Otherwise `fatal` is set and the group leaves."""
        going_on = self._may_go_on(cause)
        self._tell_failure(rank, cause, self.workers.get(rank))
        return going_on

    def _may_go_on(self, cause: BaseException) -> bool:
        self.num_failures += 1
        return not (would_happen_again(cause) or 0 <= self.resources.max_failures < self.num_failures)

    def _tell_failure(self, rank: int, cause: BaseException, where: WorkerPlace | None) -> None:
        final = would_happen_again(cause) or 0 <= self.resources.max_failures < self.num_failures
        got = why_it_died(where, str(cause)) if is_death(cause) else headline(cause)
        self.hear({"event": "failure", "rank": rank, "cause": got, "final": final})
        if final:
            self.fatal = explained(rank, cause, got, where or "place unknown", self.num_failures, self.logs)
            self._over()

    def _lost(self, group: Group, error: BaseException) -> None:
        """Ray Train gave the group up: a seat died, or its room was taken before it was reserved."""
        if self.stopped is not None or group.abandoned:
            return  # it was over already; the rest of it does not matter
        if not isinstance(error, ray.train.TrainingFailedError | RayActorError):
            raise error
        rank, cause = of_ray_train(error)
        if not group.nodes and rank < 0 and not would_happen_again(cause):
            self.num_empty_starts += 1
            if self.num_empty_starts <= EMPTY_STARTS:
                self.hear({"event": "waiting", "text": f"the workers did not start ({headline(cause)}); looking for room again"})
                return
        if not self._count(rank, cause):
            raise self.fatal or error

    def _watch(self, group: Group) -> None:
        """Looks at the nodes once a second: gone, going, or new ones to grow onto."""
        now = time.monotonic()
        if now - group.looked < LOOK_EVERY_S or not group.nodes or self.fatal is not None or self.stopped is not None or group.abandoned:
            return
        group.looked = now
        mine = set(group.nodes.values())
        lost = gone(mine)
        group.missed = {node: group.missed.get(node, 0) + 1 for node in lost}
        if any(count >= NUM_MISSED for count in group.missed.values()):
            rank = next(rank for rank, node in sorted(group.nodes.items()) if node in lost)
            if self._count(rank, ClusterError("its node does not answer any more")):
                self._abandon(group)
            return
        going = draining_nodes() & mine - self.avoid
        if going:
            self._leave_nodes(group, going, "its node is being drained")
        elif group.at.num_workers < self.resources.max_workers:
            self._grow(group, now)

    def _leave_nodes(self, group: Group, nodes: set[str], why: str) -> None:
        self.avoid |= nodes
        if not self.why:
            self.why = "going"
            ranks = sorted(rank for rank, node in group.nodes.items() if node in nodes)
            self.hear({"event": "going", "ranks": ranks, "why": why})
            self.relay.ask_to_stop()

    def _grow(self, group: Group, now: float) -> None:
        """More room, seen twice, and a group that has trained for a while: a checkpoint now, then a larger group."""
        if now - group.grow_looked < GROW_EVERY_S or now - group.started < GROW_NOT_BEFORE_S or not group.trained or self.why:
            return
        group.grow_looked = now
        mine = set(group.nodes.values()) if self.resources.placement == "STRICT_SPREAD" else set()
        free = [node for node in look(self.avoid).free if node.id not in mine]
        room = fits(self.resources, free)
        seen_before, group.room_seen = group.room_seen, room
        at = (group.at.num_workers, frozenset(node.id for node in free))
        if room and seen_before and at != self.grown:
            self.why, self.grown = "growing", at
            self.hear({"event": "growing", "to": min(self.resources.max_workers, group.at.num_workers + room)})
            self.relay.ask_to_stop()

    def _abandon(self, group: Group) -> None:
        """Leaves a group that has lost a node: its controller would wait until Ray knows, and hold the others' room meanwhile."""
        group.abandoned = True
        self._over()
        if group.controller is not None:
            ray.kill(group.controller)
        if group.room is not None:
            remove_placement_group(group.room)  # it would outlive its controller, until this driver ends
