"""Secrets: none is written in clear, and the cluster's own doors have a token.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.operator.jobs import loaded
from cluster.kube.operator.security import TOKEN_SINCE
from cluster.kube.pods import pods
from cluster.kube.rulebook import rule
from cluster.kube.scene import Scene
from cluster.kube.trees import Place

PASSWORDS = {"PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CREDENTIAL", "CREDENTIALS"}
TOKENS = {"TOKEN", "KEY", "APIKEY"}
_PUBLIC = re.compile(r"^(?:true|false|\d{1,6}|\$\([A-Za-z_]\w*\)|\$\{?[A-Za-z_]\w*\}?|[./~].*|[a-z0-9]+://[^@]*)$", re.IGNORECASE)
REMEDY = "put it into a Secret that is made outside the folder, and refer to it with valueFrom.secretKeyRef"


def is_secret(name: str, value: str) -> bool:
    """By the words of a variable's name; a path, a number, a switch or a reference is none, but any password is."""
    words = set(name.upper().replace("-", "_").split("_"))
    if words & PASSWORDS:
        return bool(value) and not value.startswith(("$", "/"))
    return bool(words & TOKENS) and "PUBLIC" not in words and bool(value) and not _PUBLIC.match(value)


@rule("secret-in-clear", "who can read the folder, its history or the object can read the secret")
def secret_in_clear(scene: Scene) -> Iterator[Flaw]:
    for holder in _holders(scene):
        for env in holder["env"]:
            if is_secret(env["name"].text, env["value"].text):
                yield env["value"].flaw("a reference to a Secret", REMEDY, got=f"{env['name'].text} in clear")
    for cluster in scene.clusters:
        for where in (
            *(cluster.spec["gcsFaultToleranceOptions"][name]["value"] for name in ("redisPassword", "redisUsername")),
            cluster.head.params["redis-password"],
        ):
            if where.text and not where.text.startswith("$"):
                yield where.flaw("a reference to a Secret", REMEDY, got="a login in clear")
    for where, name in _in_texts(scene):
        yield where.flaw("no secret in this text", REMEDY, got=f"{name} in clear")
    for place in scene.of("Secret"):
        for name in ("data", "stringData"):
            if place[name].value:
                yield place[name].flaw(
                    "no values in the folder",
                    "keep the Secret outside (kubectl create secret, ExternalSecret, SealedSecret)",
                    got="values in clear",
                )


def _in_texts(scene: Scene) -> Iterator[tuple[Place, str]]:
    """Variables of runtime environments, and a ConfigMap's keys."""
    for where in (*(job.spec["runtimeEnvYAML"] for job in scene.jobs), *(place.down("spec", "serveConfigV2") for place in scene.services)):
        yield from ((where, name) for name, value in _variables(loaded(where)) if is_secret(name, value))
    for place in scene.of("ConfigMap"):
        for name, where in place["data"].entries():
            if "\n" not in where.text.strip() and is_secret(name, where.text):
                yield where, name


def _variables(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for inside in value:
            yield from _variables(inside)
    for key, inside in value.items() if isinstance(value, dict) else ():
        if key == "env_vars" and isinstance(inside, dict):
            yield from ((str(name), str(text)) for name, text in inside.items())
        elif isinstance(inside, (dict, list)):
            yield from _variables(inside)


def _holders(scene: Scene) -> Iterator[Place]:
    """All that has environment variables."""
    for pod in pods(scene):
        yield from pod.containers
    for cluster in scene.clusters:
        yield cluster.spec["autoscalerOptions"]
        yield cluster.spec.down("historyServerOptions", "collectorOptions")


@rule("auth-missing", "who reaches the dashboard of an open cluster runs code on it")
def auth_missing(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        by_hand = cluster.head.container["env"].named("RAY_AUTH_MODE")["value"].text == "token"
        if not cluster.token_auth and not by_hand and cluster.ray_version is not None and cluster.ray_version >= TOKEN_SINCE:
            yield cluster.spec["authOptions"].warning(
                "authOptions: {mode: token}", "set mode: token; the operator makes the secret, or name yours with secretName"
            )
