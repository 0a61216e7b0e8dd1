"""What a recipe asks of a cluster: it fits, or the refusal says what is there and what to change."""

from __future__ import annotations

import pytest

from cluster.resources import Node, alive_nodes, check_fits, needs_ray, scaling_numbers
from cluster.runtime_env import compute_threads, worker_variables
from ftcore.errors import ClusterError
from ftcore.memory import GIB
from ftcore.recipe import Resources

TWO_CORES = [Node("10.0.0.1", 2, 0)]


def test_as_many_workers_as_cpus_fit() -> None:
    check_fits(Resources(workers=2), TWO_CORES)


def test_more_workers_than_cpus_are_refused_before_anything_is_launched() -> None:
    with pytest.raises(ClusterError) as refused:
        check_fits(Resources(workers=4), TWO_CORES)
    assert refused.value.wanted == "4 workers x 1 CPU"
    assert refused.value.got == "2 CPUs and 0 GPUs on 1 node (10.0.0.1: 2 CPUs)"
    assert refused.value.remedy.startswith("resources.workers=2")


def test_a_worker_must_fit_on_one_node_not_on_the_sum_of_them() -> None:
    with pytest.raises(ClusterError, match="no node can hold one such worker"):
        check_fits(Resources(workers=1, cpus_per_worker=3), [Node("a", 2, 0), Node("b", 2, 0)])


def test_gpus_count_as_well_as_cpus() -> None:
    with pytest.raises(ClusterError, match="2 workers x 1 CPU and 1 GPU"):
        check_fits(Resources(workers=2, gpus_per_worker=1), [Node("a", 16, 1)])


def test_one_worker_a_node_means_as_many_nodes() -> None:
    with pytest.raises(ClusterError, match="STRICT_SPREAD"):
        check_fits(Resources(workers=2, placement="STRICT_SPREAD"), [Node("a", 8, 0)])


def test_a_cpu_fraction_is_counted_without_rounding_error() -> None:
    check_fits(Resources(workers=10, cpus_per_worker=0.1), [Node("a", 1, 0)])


def test_the_scaling_numbers_are_those_of_the_recipe() -> None:
    numbers = scaling_numbers(Resources(workers=3, cpus_per_worker=2, gpus_per_worker=1, placement="SPREAD"), 3)
    assert numbers == {"num_workers": 3, "use_gpu": True, "resources_per_worker": {"CPU": 2, "GPU": 1}, "placement_strategy": "SPREAD"}


def test_one_worker_and_no_cluster_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not needs_ray(Resources())


def test_one_worker_joins_a_cluster_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert needs_ray(Resources())


def test_a_worker_computes_with_its_whole_cpus_and_at_least_one() -> None:
    assert [compute_threads(Resources(cpus_per_worker=cpus)) for cpus in (0.5, 1, 3.9, 4)] == [1, 1, 3, 4]


def test_credentials_do_not_travel_in_the_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    assert "hunter2" not in str(worker_variables(Resources()))


def test_freed_memory_is_kept_in_the_thread_that_ray_train_steps_in_too() -> None:
    """glibc's thresholds help the main arena only, and Ray Train runs the loop in a second thread: without one arena it gains nothing."""
    variables = worker_variables(Resources())
    assert {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} < set(variables) and variables["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.parametrize(("in_pods", "gib"), [(False, 10.0), (True, 8.0)])
def test_kuberay_counts_the_memory_for_objects_within_the_containers(monkeypatch: pytest.MonkeyPatch, in_pods: bool, gib: float) -> None:
    """It starts Ray with --memory of the whole container; Ray adds what objects may take."""
    told = {"CPU": 2.0, "memory": 8.0 * GIB, "object_store_memory": 2.0 * GIB}
    node = {"Alive": True, "Resources": told, "NodeManagerAddress": "10.0.0.1", "NodeID": "a"}
    monkeypatch.setattr("cluster.resources.ray.nodes", lambda: [node, {"Alive": False}])
    monkeypatch.delenv("RAY_USAGE_STATS_KUBERAY_IN_USE", raising=False)
    if in_pods:
        monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    [found] = alive_nodes()
    assert found.memory_gib == gib
