"""Seat: what a Ray Train worker is here. It stays while the workers it bears come and go: a killed one is back in a second, not in fifteen.

In: the driver's orders (cluster.relay), the work. Out: rank 0's value; what its worker said and how it ended, pushed to the driver.
Runs in: a Ray Train worker; the work itself runs in a process forked by its nursery (ftcore.nursery), without Ray.

A seat that loses its driver ends its worker at once: two writers of one run must not be.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train

from cluster.notices import Notices
from cluster.relay import Orders, Relay
from ftcore.backends.base import World
from ftcore.nursery import NO_VARIABLES, Birth, Nursery, Worker, WorkerDied
from pipelines.causes import headline

HEAR_S = 0.05
ORDERS_EVERY_S = 0.2
ORDERS_WITHIN_S = 10.0


def sit(order: dict[str, Any]) -> Any:
    """What every Ray Train worker runs: takes its place among the others, then bears workers until the driver says that it is over."""
    if Path(order["cwd"]).is_dir():
        os.chdir(order["cwd"])  # so that the recipe's relative paths mean what they mean to the driver
    world = _place(order["gpus"])
    nursery = nursery_here(order["preload"])
    value = Seat(nursery, order["relay"], order["work"], world).through(order["group"])
    nursery.close()  # not after an error: who takes this seat's place finds the nursery
    return value


def nursery_here(preload: Sequence[str], variables: Mapping[str, str] = NO_VARIABLES) -> Nursery:
    """The nursery of this node's seats. `variables` are the seats' own, when it is somebody else who prepares it for them."""
    folder = Path(tempfile.gettempdir()) / f"ftcore-{os.getuid()}"
    return Nursery.open(folder, preload, node=ray.util.get_node_ip_address(), variables=variables)


def _place(gpus: float) -> World:
    context = ray.train.get_context()
    device = "cpu"
    if gpus:
        from ray.train.torch import get_device  # loads torch, which a seat without a GPU does not need

        device = str(get_device())
    return World(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device, ray.util.get_node_ip_address())


class Seat:
    """One rank's place in a group."""

    def __init__(self, nursery: Nursery, relay: Relay, work: Any, world: World) -> None:
        self.nursery, self.relay, self.work, self.world = nursery, relay, work, world
        self.notices = Notices.from_environment()
        self.value: Any = None
        context = ray.train.get_context()
        self.variables = {
            "RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()), "NODE_RANK": str(context.get_node_rank()),
        }  # fmt: skip

    def through(self, group: int) -> Any:
        """Serves each generation of this group. Raises RayError when the driver is gone."""
        done = met = 0
        orders: Orders | None = None
        self._tell("seated", node_id=ray.get_runtime_context().get_node_id(), supervisor=os.getpid())
        while True:
            orders = self.relay.orders(orders, ORDERS_WITHIN_S)
            if orders.over or orders.group != group:
                return self.value
            if orders.generation > max(met, done) and self.world.is_main:
                met = orders.generation
                self.relay.meet_at(met, f"{self.world.node}:{_free_port(self.world.node)}")
            elif orders.generation > done and orders.address:
                done = orders.generation
                self._serve(orders)

    def _serve(self, orders: Orders) -> None:
        """One worker's life, or less when the driver wants another generation."""
        host, _, port = orders.address.rpartition(":")
        try:
            worker = self.nursery.bear(
                Birth(self.work, self.world, orders.address, {**os.environ, **self.variables, "MASTER_ADDR": host, "MASTER_PORT": port})
            )
        except WorkerDied as error:
            self._tell_end(orders.generation, error)
            return
        try:
            self._tell("worker", size=self.world.size, node=self.world.node, pid=worker.pid, generation=orders.generation)
            if self._accompany(worker, orders) and worker.end is not None:
                self.value = worker.end.value
                self._tell_end(orders.generation, worker.end.error)
        finally:
            worker.kill()

    def _accompany(self, worker: Worker, orders: Orders) -> bool:
        """Passes words up and orders down until the worker ends. False when it was left because of other orders."""
        told, looked = False, 0.0
        while worker.end is None:
            for message in worker.hear(HEAR_S):
                self.relay.push(message)
            if time.monotonic() - looked < ORDERS_EVERY_S:
                continue
            now, looked = self.relay.orders(), time.monotonic()
            if (now.group, now.generation) != (orders.group, orders.generation) or now.over:
                return False
            if now.stop and not told:
                told = True
                worker.ask_to_stop()
            if notice := self.notices.heard():
                self._tell("notice", why=notice, time=time.time())
        return True

    def _tell(self, event: str, **facts: Any) -> None:
        self.relay.push({"event": event, "rank": self.world.rank, **facts})

    def _tell_end(self, generation: int, error: BaseException | None) -> None:
        packed = ray.cloudpickle.dumps(error)  # the mailbox in between need not know the error's class
        self._tell("ended", generation=generation, failed=error is not None, cause=headline(error) if error else "", error=packed)


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])
