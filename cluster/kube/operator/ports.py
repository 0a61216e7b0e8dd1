"""Ports: the doors by whose names the operator makes services and looks for the dashboard, and the parameters that move them.

In: a Scene. Out: Flaws. Runs in: a terminal; imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.kube.flaws import Flaw
from cluster.kube.operator.jobs import loaded
from cluster.kube.rulebook import rule
from cluster.kube.scene import Cluster, Scene
from cluster.kube.trees import Place, root

SERVE_PORT = 8000
# Name of the port -> the parameter of `ray start` that moves it, and where it is by itself.
PARAMS = {
    "gcs-server": ("port", 6379),
    "dashboard": ("dashboard-port", 8265),
    "client": ("ray-client-server-port", 10001),
    "metrics": ("metrics-export-port", 8080),
}


@rule("dashboard-port", "the operator submits jobs and Serve configs to the head service's port dashboard, and waits for ever without it")
def dashboard_port(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        if cluster.kind == "RayCluster":
            continue
        ports, added = cluster.head.container["ports"], cluster.head.place["headService"]["spec"]["ports"]
        if ports.value and not ports.named("dashboard").given and not added.named("dashboard").given:
            yield ports.flaw("a port called dashboard on the head", "add {name: dashboard, containerPort: 8265}")
        host = cluster.head.params["dashboard-host"]
        if host.text in {"127.0.0.1", "localhost", "::1"}:
            yield host.flaw("0.0.0.0, as the operator sets it", "delete dashboard-host: the operator calls from outside the pod")
        include = cluster.head.params["include-dashboard"]
        if include.text.lower() == "false":
            yield include.flaw("true: jobs and Serve configs go through the dashboard", "delete include-dashboard")


@rule("port-params", "a port that `ray start` moves must be moved in the container's ports too: the services point there")
def port_params(scene: Scene) -> Iterator[Flaw]:
    for _, group in scene.groups:
        for name, (param, usual) in PARAMS.items():
            where, told = group.container["ports"].named(name)["containerPort"], group.params[param].text or str(usual)
            if where.number is not None and (group.is_head or name == "metrics") and told.isdigit() and where.number != int(told):
                yield where.flaw(f"{told}, where Ray listens", f"write the same number here and in rayStartParams: {param}")


@rule("serve-port", "the operator makes the service that serves from the head's ports called serve")
def serve_port(scene: Scene) -> Iterator[Flaw]:
    for cluster in scene.clusters:
        if cluster.kind != "RayService":
            continue
        ports, custom = cluster.head.container["ports"], root(cluster.spec.document).down("spec", "serveService")
        named = [port for port in ports if port["name"].text == "serve" or port["name"].text.startswith("serve-")]
        if ports.value and not named and not custom.given:
            yield ports.flaw(
                "a port called serve on the head", "add {name: serve, containerPort: 8000}: without it the service is not made"
            )
        yield from _other_port(cluster, named)


def _other_port(cluster: Cluster, named: list[Place]) -> Iterator[Flaw]:
    config = loaded(root(cluster.spec.document).down("spec", "serveConfigV2"))
    options = config.get("http_options") if isinstance(config, dict) else None
    listens = options.get("port", SERVE_PORT) if isinstance(options, dict) else SERVE_PORT
    for port in named:
        if port["name"].text == "serve" and port["containerPort"].number not in (None, listens):
            yield port["containerPort"].flaw(
                f"{listens}, where Serve listens", "write the same port here and in serveConfigV2's http_options.port"
            )
