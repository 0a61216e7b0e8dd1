"""Plan: what a run will take, before anything is launched: memory, disk, network, time, cost; and the nearest recipe that fits.

    ftcore plan pipelines/recipes/sft-lora.yaml --gpu H100 --price 2.5

In: RECIPE and PATH=VALUE overrides. Out: tables, or JSON; exit code 0 when it fits (also tightly, without --strict), 3 when not.
Runs in: a person's terminal, the driver; no torch and no ray, unless `--probe` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.runtime_env import compute_threads
from cluster.worker_memory import Share, share_here
from ftcore.alternatives import Alternative
from ftcore.cli import guarded
from ftcore.devices import DEVICES, MODEL_FLOPS_SHARE, Device, device_of
from ftcore.errors import ConfigError
from ftcore.forecast import Forecast, forecast, pasted, verdict_of
from ftcore.memory import GIB, Host
from ftcore.recipe import Recipe, load_recipe

NOT_RUNNABLE = 3
"""As `ftcore doctor` has it."""
GPUS_PER_NODE = 8
"""Assumed of nodes that are only told by --host-memory: as many as most large ones have."""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    device = device_of(options.gpu) if options.gpu else None
    known = forecast(recipe)
    share = memory_of(recipe, options.memory, device, options.host_memory)
    seconds = known.seconds(device) if device else None
    how = f"by {device.name}'s datasheet at {MODEL_FLOPS_SHARE:.0%} of its peak" if device else ""
    if options.probe:
        from ftcore.plan_probe import probe, probed_device  # loads torch

        threads = compute_threads(recipe.resources)
        seconds = probe(known, threads)
        how = f"by a probe on {probed_device(recipe, threads)}"
    facts = figures(known, share, seconds, options.price)
    if options.json:
        print(json.dumps(facts | {"memory_from": share.source, "notes": known.notes}, indent=1))
    else:
        print("\n".join(report(known, facts, share, how)))
    verdict = facts["verdict"]
    return NOT_RUNNABLE if verdict == "does not fit" or (verdict == "tight" and options.strict) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ftcore plan", description="What a run will take, before it is launched. Exit code 0 or 3.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like backend.micro_batch=4")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--gpu", metavar="NAME", help=f"what each worker computes on: {' | '.join(DEVICES)}")
    place.add_argument("--memory", metavar="GIB", type=_above_zero, help="what one worker may take")
    parser.add_argument(
        "--host-memory", metavar="GIB", type=_above_zero,
        help=f"of GPU workers: what a node has beside its GPUs, of which it is taken to have {GPUS_PER_NODE}; else it is told, not judged",
    )  # fmt: skip
    parser.add_argument("--price", metavar="X", type=_above_zero, help="of one worker for an hour; the cost is told in the same money")
    parser.add_argument("--probe", action="store_true", help="time two shallow models of this width here, on a worker's threads or GPU")
    parser.add_argument("--strict", action="store_true", help="a tight fit, too, makes the exit code 3")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_intermixed_args(argv)


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text}")
    return value


def memory_of(recipe: Recipe, given: float | None, device: Device | None, host_gib: float | None) -> Share:
    """What one worker may take, and a node's host, by the command line, else on this machine."""
    asked = recipe.resources
    if not asked.gpus_per_worker and (device is not None or host_gib is not None):
        raise ConfigError(
            "this recipe trains on CPUs", where="--gpu" if device else "--host-memory", got="resources.gpus_per_worker: 0",
            wanted="1 or more", remedy="add resources.gpus_per_worker=1, or give --memory",
        )  # fmt: skip
    hosts: tuple[Host, ...] = ()
    if host_gib is not None:
        seats = 1 if asked.placement == "STRICT_SPREAD" else int(GPUS_PER_NODE / asked.gpus_per_worker + 1e-9)
        hosts = (Host("--host-memory", host_gib, seats),)
    if given is not None:
        return Share(given, "--memory", hosts)
    if device is not None:
        return Share(device.memory_gib * min(1.0, asked.gpus_per_worker), f"{device.name}: {device.source}", hosts)
    found = share_here(asked)
    source = found.source if found.gib is not None else f"{found.source}: give --gpu NAME or --memory GIB"
    return Share(found.gib, source, hosts or found.hosts)


def figures(known: Forecast, share: Share, seconds: float | None, price: float | None) -> dict[str, Any]:
    """What a program may want of it."""
    memory = (share.gib or 0.0) * GIB
    verdict = known.verdict(memory, share.hosts) if share.gib else None
    found = known.nearest(memory, share.hosts) if share.gib and verdict != "fits" else None
    workers, host = known.recipe.resources.max_workers, known.fullest(share.hosts)
    return {
        "verdict": verdict, "memory_gib": share.gib, "peak_gib": known.need.peak / GIB, "phase": known.need.worst_phase,
        "host_peak_gib": known.need.host_peak / GIB, "host_memory_gib": host.gib if host else None,
        "host_needs_gib": host.takes(known.need) if host else None,
        "parameters": known.shape.num_parameters, "parameters_by_part": known.shape.parts(), "trained": known.moves.count,
        "parts": [asdict(part) for part in known.need.parts], "disk_gib": known.disk_bytes / GIB,
        "network_gib_per_step": known.network_bytes / GIB, "steps": known.steps, "seconds": seconds,
        "cost": price * workers * seconds / 3600 if price and seconds else None, "nearest": found.overrides if found else None,
        "nearest_host_peak_gib": found.need.host_peak / GIB if found else None,
    }  # fmt: skip


def report(known: Forecast, facts: dict[str, Any], share: Share, how: str) -> list[str]:
    """`how`: where the time comes from; "" where nowhere."""
    shape, recipe = known.shape, known.recipe
    parts = ", ".join(f"{name} {count:,}" for name, count in shape.parts().items())
    lines = [
        f"{recipe.name}: {recipe.method.kind} of {recipe.model.path} ({shape.model_type}), {recipe.resources.max_workers} worker(s), "
        f"backend {recipe.backend.kind}",
        f"parameters     {shape.num_parameters:,} ({parts})",
        f"trained        {known.moves.count:,} ({known.moves.count / shape.num_parameters:.2%})",
        "", *_memory_table(known), "",
        f"disk           {facts['disk_gib']:.2f} GiB: {recipe.output.keep} checkpoints kept, the best, one being written, and the result",
        f"network        {facts['network_gib_per_step']:.3f} GiB sent by each worker in a step",
        f"steps          {known.steps if known.steps is not None else 'unknown until the rows are prepared'}",
        f"time           {_time(facts['seconds'], how)}",
    ]  # fmt: skip
    lines += [f"cost           {facts['cost']:.2f}"] if facts["cost"] is not None else []
    lines += [f"note: {text}" for text in known.notes]
    if share.gib is None:
        return [*lines, "", f"not judged: {share.source}", *_devices(known)]
    lines += ["", f"{facts['verdict'].upper()}: {known.need.peak / GIB:.2f} GiB of {share.gib:.2f} GiB a worker ({share.source})"]
    lines += [_host(known, share)] if known.need.on_gpu else []
    return lines if facts["verdict"] == "fits" else [*lines, *_ways_out(known, share.gib, share.hosts)]


def _memory_table(known: Forecast) -> Iterator[str]:
    phase = known.need.worst_phase
    yield f"memory of the rank that holds most, in phase `{phase}`:"
    for part in known.need.parts:
        if phase in part.phases:
            place = " (host)" if part.on_host and known.need.on_gpu else ""
            yield f"  {part.bytes / GIB:>9.2f} GiB  {part.name + place:<36}{part.why}"
    yield f"  {known.need.peak / GIB:>9.2f} GiB  in all" + (
        f"; {known.need.host_peak / GIB:.2f} GiB on its host" if known.need.on_gpu else ""
    )


def _time(seconds: float | None, how: str) -> str:
    if seconds is None:
        return "unknown without steps" if how else "unknown: give --gpu NAME, or --probe on the machine that will train"
    return f"{seconds / 3600:.2f} h ({seconds:,.0f} s), {how}"


def _host(known: Forecast, share: Share) -> str:
    host = known.fullest(share.hosts)
    if host is None:
        return f"on its host {known.need.host_peak / GIB:.2f} GiB a worker, not judged: give --host-memory GIB"
    return f"on its host {host.takes(known.need):.2f} GiB of {host.gib:.2f} GiB, by {host.workers(known.need)} worker(s) ({host.name})"


def _devices(known: Forecast) -> Iterator[str]:
    for device in DEVICES.values():
        yield f"  {device.name:<10}{device.memory_gib:>7.1f} GiB  {known.verdict(device.memory_gib * GIB)}"


def _ways_out(known: Forecast, memory_gib: float, hosts: Sequence[Host]) -> Iterator[str]:
    found = known.nearest(memory_gib * GIB, hosts)
    if found is None:
        yield "no change of this recipe that is known here would fit: take a smaller model, or larger devices"
    else:
        yield f"nearest that fits ({found.need.peak / GIB:.2f} GiB a worker{_beside(found)}):"
        yield f"  {pasted(found)}"
    yield "one change at a time:"
    for other in known.alternatives():
        verdict = verdict_of(other.need, memory_gib * GIB, hosts)
        yield f"  {other.need.peak / GIB:>9.2f} GiB{_beside(other, 9)}  {verdict:<14}{pasted(other)}"


def _beside(other: Alternative, width: int = 0) -> str:
    return f", {other.need.host_peak / GIB:>{width}.2f} on its host" if other.need.on_gpu else ""


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
