"""Trainer: Ray Train as this product uses it: seats for workers, no data sets, and a group that can be given up from outside.

In: what each worker runs, how many, where. Out: a trainer to `fit`; two messages a group says about itself. Runs in: the driver; the
callback in Ray Train's controller.

    {"event": "controller", "group", "actor"}   {"event": "room", "group", "placement"}
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback  # the public ones do not run at a start
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # TorchTrainer would load torch into every seat

from cluster.placement import Place
from cluster.relay import Relay
from cluster.resources import scaling_numbers
from cluster.runtime_env import worker_variables
from ftcore.recipe import Resources
from pipelines.seat import sit

RunConfig: Any = ray.train.RunConfig  # the signatures that mypy reads are those of Ray Train v1
ScalingConfig: Any = ray.train.ScalingConfig
FailureConfig: Any = ray.train.FailureConfig
NOT_OURS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each starts a process of its own: for Ray Data, which feeds no worker here, and to free a lost controller's room, which pipelines.lead
does itself (Ray's cleaner cannot where the cluster has no dashboard)."""


class LeanTrainer(DataParallelTrainer):
    """A group is up sooner by the start of three processes."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config
        return super()._initialize_and_run_controller(**{**parts, "scaling_policy": _Settled(scaling)})

    def _create_default_callbacks(self) -> Any:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_OURS)]


def trainer(order: dict[str, Any], relay: Relay, resources: Resources, at: Place, *, name: str, scratch: str) -> LeanTrainer:
    """One group of seats. Ray Train's own notes go to `scratch`: our state is in the run folder. It retries nothing by itself."""
    return LeanTrainer(
        sit,
        train_loop_config=order,
        scaling_config=ScalingConfig(**scaling_numbers(resources, at.num_workers), label_selector=at.selector() or None),
        run_config=RunConfig(
            name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=[_Introduction(relay, order["group"])], worker_runtime_env={"env_vars": worker_variables(resources)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )  # fmt: skip


class _Settled(FixedScalingPolicy):
    """As many workers as there was room for, without a word to the coordinator of autoscalers: an actor of its own, whose start everything
    else would wait for. A cluster that can grow sees the placement group that waits."""

    def after_controller_start(self, train_run_context: object) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _Introduction(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray Train's controller: tells the driver who it is and which room it holds, so that the group can be given up."""

    def __init__(self, relay: Relay, group: int) -> None:
        self.relay, self.group = relay, group

    def after_controller_start(self, train_run_context: object) -> None:
        self.relay.push({"event": "controller", "group": self.group, "actor": ray.get_runtime_context().current_actor})

    def after_worker_group_start(self, worker_group: Any) -> None:
        room = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self.relay.push({"event": "room", "group": self.group, "placement": room})
