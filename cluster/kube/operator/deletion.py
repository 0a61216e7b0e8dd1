"""Deletion: what a RayJob deletes when it ends, in which order, and the ways that exclude each other.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from cluster.kube.flaws import Flaw
from cluster.kube.rulebook import rule
from cluster.kube.scene import Job, Scene
from cluster.kube.trees import Place

LEGACY = ("onSuccess", "onFailure")
ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
"""Each may come no earlier than those before it."""


@rule("deletion-strategy", "a strategy is either onSuccess with onFailure, or rules; shutdownAfterJobFinishes excludes rules")
def deletion_strategy(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["deletionStrategy"]
        if not where.given:
            continue
        if not scene.enabled("RayJobDeletionPolicy"):
            yield where.flaw("the feature gate RayJobDeletionPolicy", "turn the gate on in the operator, or delete deletionStrategy")
        rules, legacy = bool(where["deletionRules"].value), [name for name in LEGACY if where[name].given]
        if not rules and not legacy:
            yield where.flaw("deletionRules, or both onSuccess and onFailure", "write deletionRules, or delete deletionStrategy")
        if rules and legacy:
            yield where.flaw("deletionRules, or onSuccess and onFailure, not both", "delete onSuccess and onFailure")
        if rules and job.spec["shutdownAfterJobFinishes"].on:
            yield job.spec["shutdownAfterJobFinishes"].flaw(
                "false, or nothing, beside deletionRules", "delete it: a rule with DeleteCluster does the same"
            )


@rule("deletion-policies", "onSuccess and onFailure come together, each with a policy that can be carried out")
def deletion_policies(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        where = job.spec["deletionStrategy"]
        if not any(where[name].given for name in LEGACY):
            continue
        for name in LEGACY:
            policy = where[name]["policy"]
            if not policy.given:
                yield policy.flaw("DeleteCluster, DeleteWorkers, DeleteSelf or DeleteNone", f"write deletionStrategy.{name}.policy")
            elif policy.text == "DeleteNone" and job.spec["shutdownAfterJobFinishes"].on:
                yield policy.flaw("not DeleteNone beside shutdownAfterJobFinishes: true", "delete one of the two")
            yield from _impossible(job, policy)


def _impossible(job: Job, policy: Place) -> Iterator[Flaw]:
    if job.selects and policy.text in {"DeleteCluster", "DeleteWorkers"}:
        yield policy.flaw("DeleteSelf or DeleteNone with clusterSelector", "change the policy: the selected cluster is not the job's own")
    elif policy.text == "DeleteWorkers" and job.autoscaling:
        yield policy.flaw("not DeleteWorkers with autoscaling", "use DeleteCluster: the autoscaler would bring the workers back")


@rule("deletion-rules", "each rule waits for one state, says how long, and is there once")
def deletion_rules(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        seen = set()
        for place in job.spec["deletionStrategy"]["deletionRules"]:
            condition, policy = place["condition"], place["policy"]
            states = [name for name in ("jobStatus", "jobDeploymentStatus") if condition[name].given]
            if len(states) != 1:
                yield condition.flaw("one of jobStatus and jobDeploymentStatus", "write exactly one of them")
                continue
            ttl = condition["ttlSeconds"]
            if ttl.number is not None and ttl.number < 0:
                yield ttl.flaw("0 seconds or more", "write a number that is not negative")
            yield from _impossible(job, policy)
            key = (states[0], condition[states[0]].text, policy.text)
            if key in seen:
                yield place.flaw(f"each rule once: {policy.text} is already there for {key[1]}", "delete one of the two")
            seen.add(key)


@rule("deletion-order", "workers go first, then the cluster, then the job: a later step may not have a shorter time")
def deletion_order(scene: Scene) -> Iterator[Flaw]:
    for job in scene.jobs:
        found: dict[tuple[str, str], dict[str, Place]] = {}
        for place in job.spec["deletionStrategy"]["deletionRules"]:
            for state in ("jobStatus", "jobDeploymentStatus"):
                if place["condition"][state].text:
                    same = found.setdefault((state, place["condition"][state].text), {})
                    same.setdefault(place["policy"].text, place["condition"]["ttlSeconds"])
        for (_, value), ttls in found.items():
            steps = [(policy, ttls[policy]) for policy in ORDER if policy in ttls]
            for (earlier, first), (later, second) in pairwise(steps):
                if (second.number or 0) < (first.number or 0):
                    yield second.flaw(
                        f"at least {first.number} for {value}, as {earlier} has",
                        f"raise it: {later} may not come before {earlier}",
                        got=second.number or 0,
                    )
