"""Submit: a recipe as a job of a Ray cluster: checked here, uploaded, followed to its end, with the job's own exit code.

    ftcore submit sft pipelines/recipes/sft-lora.yaml resources.workers=3 --address http://head:8265
    ftcore submit tune pipelines/recipes/demo-lora.yaml -- --search pipelines/searches/lora.yaml      what follows -- is the pipeline's
    ftcore submit --follow raysubmit_...          goes on following one

In: the name of a pipeline, its recipe and overrides. Out: the job's log, its exit code (75 when it was stopped and can go on).
Runs in: a person's terminal; needs the address of the cluster's dashboard, not a raylet.

Ctrl-C stops the job as SIGTERM does, so that it seals a checkpoint; a second Ctrl-C leaves it to itself. A lost connection is taken up
again where the log broke off. Nothing secret goes along: a job's command line and variables are for everybody to read.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from cluster.follow import DETACHED, Follower
from cluster.runtime_env import FOLLOWING, checkout
from cluster.token_auth import has_token, is_this_machine, refuse_open
from ftcore.errors import ClusterError, ConfigError
from ftcore.recipe import load_recipe

STOP_WAIT_S = 300
"""Seconds a stopped job has for its checkpoint before it is killed; Ray's own default is 3."""
KNOCK_S = 5.0
SENT_ALONG = "submitted"
SAME_AS = {"pretrain": "sft"}
NO_JOB = ("demo", "build", "fit", "launch", "render", "runs", "rows")
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE)", re.IGNORECASE)
LOGIN_IN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+:[^/\s@]+@", re.IGNORECASE)
SHORTEST_SECRET = 8


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before ray is imported: it looks once
    if options.follow:
        return Follower(client_for(options.address), options.follow).to_the_end()
    script = script_of(options.pipeline)
    load_recipe(options.recipe, options.overrides)  # a wrong recipe is refused before anything is uploaded
    environment = variables(os.environ)
    refuse_secrets([*options.overrides, *options.more, *environment.values()], os.environ)
    client = client_for(options.address)
    with ExitStack() as stack:
        working_dir, named = packed(Path(options.recipe), stack)
        entrypoint = shlex.join(["python", *script, named, *options.overrides, *options.more])
        job = submitted(client, entrypoint, {"working_dir": working_dir, "env_vars": environment})
    print(f"job {job} submitted to {client.get_address()}: {entrypoint}", flush=True)
    if options.no_wait:
        print(f"follow it with: ftcore submit --follow {job}")
        return 0
    code = Follower(client, job).to_the_end()
    if code == Follower.STOPPED:
        print(f"stopped; go on with: {shlex.join(['ftcore', 'submit', *(sys.argv[2:] if argv is None else argv)])}", file=sys.stderr)
    elif code == DETACHED:
        print(f"left to itself; follow it with: ftcore submit --follow {job}", file=sys.stderr)
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ftcore submit", description="Runs a recipe as a job of a Ray cluster and follows it.")
    parser.add_argument("pipeline", nargs="?", help="sft, pretrain, prepare, doctor, ...: a script of pipelines/")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file; one outside the checkout is sent along")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like resources.workers=4")
    parser.add_argument("--address", help="of the cluster's dashboard (else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)")
    parser.add_argument("--no-wait", action="store_true", help="return once it is submitted")
    parser.add_argument("--follow", metavar="JOB", help="follow a job that was submitted before")
    parser.add_argument("more", metavar="-- OPTION", nargs="*", help="options of the pipeline itself, like -- --search FILE")
    end = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(argv[:end])
    options.more = list(argv[end + 1 :])
    if not options.follow and not options.recipe:
        parser.error("name a pipeline and a RECIPE, or --follow JOB")
    return options


def script_of(pipeline: str) -> list[str]:
    """The words after `python` that run a pipeline: a file of the checkout that travels along, else the installed module."""
    name = SAME_AS.get(pipeline, pipeline)
    folder = Path(__file__).resolve().parent.parent / "pipelines"
    scripts = sorted(
        path.stem for path in folder.glob("*.py") if path.stem not in NO_JOB and "__main__" in path.read_text(encoding="utf-8")
    )
    if name not in scripts:
        raise ConfigError("there is no such pipeline", got=pipeline, wanted=" | ".join([*scripts, *SAME_AS]))
    return [f"pipelines/{name}.py"] if checkout() else ["-m", f"pipelines.{name}"]


def packed(recipe: Path, stack: ExitStack) -> tuple[str, str]:
    """(what is uploaded, the recipe's path in it): the checkout as its .rayignore leaves it, or an archive of it and the recipe."""
    root = checkout()
    if root and recipe.resolve().is_relative_to(root):
        inside = recipe.resolve().relative_to(root)
        if inside.parts[:2] == ("pipelines", "recipes"):  # the rest of a checkout may be left at home by .rayignore
            return str(root), str(inside)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftcore-submit-")))
    archive, named = folder / "working_dir.zip", f"{SENT_ALONG}/{recipe.name}"
    if root:
        from ray._private.ray_constants import get_runtime_env_default_excludes
        from ray._private.runtime_env.packaging import create_package  # what Ray itself packs a folder with; there is no public name

        logging.getLogger(create_package.__module__).setLevel(logging.ERROR)
        create_package(str(root), archive, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(archive, "a") as file:
        file.write(recipe, named)
        file.writestr(f"{SENT_ALONG}.txt", "recipes that were sent along with this job\n")
    return str(archive), named


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What the job's processes see of our environment: where things are, never who we are."""
    kept = {name: environment[name] for name in FOLLOWING if name in environment}
    return kept | {"RAY_JOB_STOP_WAIT_TIME_S": environment.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))}


def refuse_secrets(texts: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ConfigError when a job's public record would hold a password: one of our own variables' values, or a login in an address."""
    own = {name: value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET}
    for text in texts:
        found = [f"the value of {name}" for name, value in own.items() if value in text]
        found += ["a login in an address"] if LOGIN_IN_URL.search(text) else []
        if found:
            raise ConfigError(
                "a secret would stand in the job's record, which everybody on the cluster can read", got=", ".join(found),
                remedy="leave it out: nodes find credentials in their own environment, files or roles",
            )  # fmt: skip


def client_for(address: str | None) -> Any:
    """A JobSubmissionClient that answers. Raises ClusterError: nobody there, or a token that is missing or wrong."""
    from ray.exceptions import RayError  # half a second, which a wrong recipe need not wait for
    from ray.job_submission import JobSubmissionClient

    named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    where = (as_url(named) if named else dashboard_of(os.environ.get("RAY_ADDRESS", ""))) or "http://127.0.0.1:8265"
    os.environ["RAY_API_SERVER_ADDRESS"] = where  # Ray lets these variables overrule the address it is given
    try:
        knock(where)
        return JobSubmissionClient(where)
    except ClusterError:
        raise
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        if "401" in text or "403" in text or "uthent" in text:
            raise ClusterError(
                "this Ray cluster does not take our token", where=where, got=text[:200],
                remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the one its nodes were started with",
            ) from error  # fmt: skip
        raise ClusterError(
            "no Ray dashboard answers", where=where, got=text[:200], wanted="http://HEAD:8265",
            remedy="start the head with --dashboard-host=0.0.0.0 or tunnel to it, and give --address",
        ) from error  # fmt: skip


def knock(where: str) -> None:
    """Asks without a token: OSError when nobody is there, ClusterError when an open cluster on another machine answers."""
    host, port = urlsplit(where).hostname or "", urlsplit(where).port or 80
    try:
        with urlopen(f"{where.rstrip('/')}/api/version", timeout=KNOCK_S):
            if not is_this_machine(f"{host}:{port}"):
                refuse_open(where, print)
    except HTTPError as error:
        if error.code not in (401, 403):
            raise


def as_url(address: str) -> str:
    """What people type for a dashboard: head:8265, head, http://head:8265; ray://head:10001 means the same host's."""
    if "://" in address:
        return dashboard_of(address)
    return f"http://{address}" if ":" in address else f"http://{address}:8265"


def dashboard_of(address: str) -> str:
    """RAY_ADDRESS names the GCS (host:6379); jobs go to the same host's dashboard."""
    if address.startswith(("http://", "https://")):
        return address
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    return f"http://{host}:8265" if colon and port.isdigit() else ""


def submitted(client: Any, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    try:
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except (RuntimeError, OSError, ValueError) as error:
        raise ClusterError(
            "the job was not accepted", where=client.get_address(), got=" ".join(str(error).split())[:300],
            remedy="an upload may hold 500 MB: .rayignore says what stays at home",
        ) from error  # fmt: skip
