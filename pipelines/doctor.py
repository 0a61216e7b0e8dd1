"""Doctor: looks at every node before a run depends on it, and tells all findings at once, each with its remedy.

    ftcore doctor pipelines/recipes/sft-lora.yaml resources.workers=3            ftcore doctor            (no recipe: only the nodes)

In: a recipe or nothing, the cluster (RAY_ADDRESS, a job's) or only this machine. Out: a table or JSON; exit code 0 when a run can begin
(warnings included, unless --strict), 3 when not. Runs in: the driver, with a probe on every node.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.connect import connect, local_num_cpus
from cluster.findings import EVERYWHERE, Finding, clocks, disks, machines, runnable, table, together, versions
from cluster.node_facts import NodeFacts, node_facts
from cluster.preflight import HERE, Nodes
from cluster.resources import Node, alive_nodes, check_fits, needs_ray, wants
from cluster.runtime_env import joins_cluster
from ftcore.cli import guarded
from ftcore.data.read import plan, read
from ftcore.errors import ClusterError, FtcoreError
from ftcore.model_files import model_files
from ftcore.recipe import Recipe, load_recipe
from ftcore.reduce_ping import Ping, reduce_ping
from ftcore.shared_folder import find, leave, take_away
from pipelines.runs import at_home

NOT_RUNNABLE = 3
SLOW_MIB_S, SLOW_MS = 20.0, 50.0


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--invariants" in arguments:
        from pipelines.invariants import main as invariants  # trains: imports torch, peft and all

        arguments.remove("--invariants")
        return invariants(arguments)
    options = parse(arguments)
    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    findings = examine(recipe, options.min_free_gib, quiet=options.json)
    good = runnable(findings, strict=options.strict)
    if options.json:
        print(json.dumps({"runnable": good, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(table(findings))
        counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
        print(f"\n{'runnable' if good else 'NOT runnable'}: {counts['problem']} problems, {counts['warning']} warnings")
    return 0 if good else NOT_RUNNABLE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ftcore doctor", description="Looks at every node; every finding with its remedy. Exit code 0 or 3."
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also look at what this recipe needs: folders, model, resources")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like resources.workers=4")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--strict", action="store_true", help="a warning, too, makes the exit code 3")
    parser.add_argument("--min-free-gib", type=float, default=5.0, metavar="N", help="free disk wanted at every folder (5)")
    parser.add_argument("--invariants", action="store_true", help="prove the invariances on your own model and backend instead")
    return parser.parse_intermixed_args(argv)


def examine(recipe: Recipe | None, min_free_gib: float, *, quiet: bool = False) -> list[Finding]:
    """Everything there is to find, without stopping at the first."""
    joined = joins_cluster()
    log = (lambda line: None) if quiet else partial(print, flush=True)
    if joined:
        connect(log=log)
    elif not quiet:
        print("no cluster (RAY_ADDRESS is not set): looking at this machine only", flush=True)
    recipe = at_home(recipe, log) if recipe else None
    nodes = Nodes(joined=joined)
    try:
        return together(_findings(nodes, recipe, min_free_gib), len(nodes.names))
    finally:
        nodes.close()


def _findings(nodes: Nodes, recipe: Recipe | None, min_free_gib: float) -> list[Finding]:
    folders = _folders(recipe)
    local = [folder for folder in folders if "://" not in folder]
    facts, offsets, findings = nodes.facts([*local, _temporary()])
    findings += versions(node_facts(), facts, _used(recipe))
    findings += machines(facts, nodes.counted) + disks(facts, min_free_gib) if facts else []
    findings += clocks(offsets) if offsets else []
    findings += nodes.ports()
    if recipe:
        findings += fits(recipe, alive_nodes() if nodes.counted else [_here(facts)])
        findings += rows(recipe)
        findings += [finding for folder in folders for finding in shared(nodes, folder)]
        findings += model(nodes, recipe)
    return findings + all_reduce(nodes)


def _folders(recipe: Recipe | None) -> list[str]:
    """Where a run writes, each once; absolute, because a node's folder is another."""
    if recipe is None:
        return []
    named = dict.fromkeys([recipe.output.runs, recipe.output.store, recipe.data.cache])
    return [folder if "://" in folder else str(Path(folder).absolute()) for folder in named]


def _temporary() -> str:
    return "/tmp" if Path("/tmp").is_dir() else str(Path.cwd())


def _used(recipe: Recipe | None) -> set[str]:
    """The packages of which only some recipes make use."""
    if recipe is None:
        return set()
    chosen = {"deepspeed": recipe.backend.kind == "deepspeed", "bitsandbytes": recipe.method.kind == "qlora" or "8bit" in str(recipe.optim)}
    return {name for name, is_used in chosen.items() if is_used}


def _here(facts: Mapping[str, NodeFacts]) -> Node:
    """This machine as a Ray of our own would count it."""
    return Node(HERE, local_num_cpus(), sum(len(fact.gpus) for fact in facts.values()))


def rows(recipe: Recipe) -> list[Finding]:
    """Whether each source can be found and read: its first row."""
    findings = []
    for index, source in enumerate(recipe.data.sources):
        where = f"data.sources.{index}"
        try:
            found = any(True for piece in plan([source]) for _ in read(piece))
        except FtcoreError as error:
            findings.append(Finding("problem", "rows", EVERYWHERE, f"{where}: {error.what}: {error.where}", error.remedy))
            continue
        text = f"{where}: {source.path} " + ("can be read" if found else "holds no row")
        findings.append(Finding("ok" if found else "problem", "rows", EVERYWHERE, text, "" if found else "check the path"))
    return findings


def fits(recipe: Recipe, nodes: list[Node]) -> list[Finding]:
    """Whether the workers have room."""
    asked = recipe.resources
    if not needs_ray(asked):
        return []
    try:
        check_fits(asked, nodes)
    except ClusterError as error:
        return [Finding("problem", "resources", EVERYWHERE, f"{error.what}: wanted {error.wanted}, got {error.got}", error.remedy)]
    return [Finding("ok", "resources", EVERYWHERE, f"room for {wants(asked)}, {asked.placement}")]


def shared(nodes: Nodes, folder: str) -> list[Finding]:
    """Whether every node can write to a folder and reads what the others wrote."""
    left = nodes.ask(leave, folder, each=[(f"doctor-{os.getpid()}-{number}",) for number in range(len(nodes.names))])
    marks = {name: answer.value for name, answer in left.items() if answer.value}
    seen = nodes.ask(find, folder, list(marks.values()))
    nodes.ask(take_away, folder, list(marks.values()))
    findings = [
        Finding("problem", "storage", name, f"cannot write {folder}: {answer.error}", "mount it there, mend permissions or credentials")
        for name, answer in left.items() if answer.error
    ]  # fmt: skip
    for name, answer in seen.items():
        missing = [other for other, mark in marks.items() if mark not in (answer.value or ())]
        if missing:
            text = f"{folder}: does not see what {', '.join(missing)} wrote" + (f" ({answer.error})" if answer.error else "")
            findings.append(Finding("problem", "storage", name, text, "use a folder that all nodes mount (NFS, Lustre...) or s3://"))
    return findings or [Finding("ok", "storage", EVERYWHERE, f"{folder}: written by each, read by all")]


def model(nodes: Nodes, recipe: Recipe) -> list[Finding]:
    """Whether the base is there, and the same one, on every node."""
    path = str(Path(recipe.model.path).absolute()) if Path(recipe.model.path).is_dir() else recipe.model.path
    answers = nodes.ask(model_files, path, recipe.model.revision)
    findings, is_hub = [], path.count("/") == 1 and not path.startswith((".", "/", "~"))
    for name, answer in answers.items():
        if answer.value is None:
            remedy = (
                "it is downloaded at the start, if the hub can be reached" if is_hub else "copy it there, or use a folder all nodes mount"
            )
            findings.append(Finding("warning" if is_hub else "problem", "model", name, f"{path}: {answer.error}", remedy))
    found = {name: answer.value for name, answer in answers.items() if answer.value is not None}
    if len({files.digest for files in found.values()}) > 1:
        text = "; ".join(f"{name} {files.digest[:12]}" for name, files in found.items())
        findings.append(
            Finding("problem", "model", ", ".join(found), f"{path} is not the same everywhere: {text}", "copy one of them to the others")
        )
    if found and not findings:
        files = next(iter(found.values()))
        findings = [Finding("ok", "model", EVERYWHERE, f"{path}: {files.num_files} files, {files.gib:.2f} GiB, {files.digest[:12]}")]
    return findings


def all_reduce(nodes: Nodes) -> list[Finding]:
    """One rank a node: they meet, their sum is right, and how fast that is. Over gloo; a GPU run's NCCL uses the same interfaces."""
    host = nodes.names[0].partition("#")[0] if nodes.counted else "127.0.0.1"
    port = nodes.ask(_free_port)[nodes.names[0]].value
    size = len(nodes.names)
    answers = nodes.ask(reduce_ping, "gloo", host, port, each=[(rank, size) for rank in range(size)])
    findings = [
        Finding("problem", "all-reduce", name, answer.error, "set GLOO_SOCKET_IFNAME to the node's interface where `ray start` runs")
        for name, answer in answers.items() if answer.error
    ]  # fmt: skip
    pings: list[Ping] = [answer.value for answer in answers.values() if answer.value is not None]
    if findings or not pings:
        return findings
    slowest = max(ping.latency_ms for ping in pings), min(ping.mib_s for ping in pings)
    speed = f": {slowest[0]:.2f} ms for one number, {slowest[1]:.0f} MiB/s for 8 MiB" if size > 1 else ""
    text = f"{size} node{'s' * (size != 1)} over {pings[0].backend}{speed}"
    if size > 1 and (slowest[0] > SLOW_MS or slowest[1] < SLOW_MIB_S):
        return [
            Finding("warning", "all-reduce", EVERYWHERE, text, "slow: is it the right interface (GLOO_SOCKET_IFNAME), an idle network?")
        ]
    return [Finding("ok", "all-reduce", EVERYWHERE if nodes.counted else HERE, text)]


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("", 0))
        return int(door.getsockname()[1])


if __name__ == "__main__":
    sys.exit(guarded(lambda argv: main(argv), sys.argv[1:]))
