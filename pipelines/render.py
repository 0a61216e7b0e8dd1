"""Render: a recipe as a RayJob for Kubernetes, in the form of an overlay of k8s/: nobody edits YAML to change a rank.

    ftcore k8s render pipelines/recipes/sft-lora.yaml --overlay gpu data.sources.0.path=s3://rows/day.jsonl | kubectl create -f -

In: RECIPE and PATH=VALUE overrides, an overlay. Out: a ConfigMap with the recipe and a RayJob whose pods hold what the forecast says.
Runs in: a person's terminal, with kustomize or kubectl; no torch, no ray, no cluster.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cluster.kube.building import build
from cluster.kube.documents import Document
from cluster.kube.jobs import RECIPE_AT, Nodes, Pods, Run, as_yaml, job_name, mounts_of, nodes_of, packed, rendered
from ftcore.devices import device_of
from ftcore.errors import ConfigError
from ftcore.forecast import TIGHT, Forecast, forecast
from ftcore.memory import GIB
from ftcore.recipe import Recipe, load_recipe
from ftcore.search import load_search

OVERLAYS = Path(__file__).resolve().parent.parent / "k8s" / "overlays"
CUDA_GIB = 4.0
"""What a process that uses a GPU holds of its host beside the forecast: CUDA's libraries and its context."""
IMAGE_AT = "/app"
"""Where the image has the checkout."""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    folder = overlay(options.overlay)
    job = template(folder, "tune" if options.search else "sft")
    nodes = nodes_of(job, str(folder))
    require_there(recipe, mounts_of(job))
    known = forecast(seen_from_here(recipe, options.config))
    pods = pods_of(known, nodes)
    run = run_of(recipe, options, pods)
    text = as_yaml(rendered(job, run))
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    need = f"{known.need.peak / GIB:.2f} GiB a worker" + (f", {known.need.host_peak / GIB:.2f} on its host" if known.need.on_gpu else "")
    print(f"RayJob/{run.name}: {pods}; forecast: {need}", file=sys.stderr)
    print(
        f"next:  kubectl create -f {options.out or '-'}; kubectl -n {job['metadata'].get('namespace', 'default')} get rayjob -w",
        file=sys.stderr,
    )
    return 0


def overlay(name: str) -> Path:
    """A folder of the checkout's, by its name, or any folder with a kustomization. Raises ConfigError."""
    if Path(name).is_dir() and ("/" in name or name.startswith(".")):
        return Path(name)
    names = sorted(path.name for path in OVERLAYS.iterdir() if path.is_dir()) if OVERLAYS.is_dir() else []
    if name in names:
        return OVERLAYS / name
    near = get_close_matches(name, names, n=1)
    raise ConfigError(
        "there is no such overlay", where="--overlay", got=name, wanted=f"{' | '.join(names)}, or a folder with a kustomization.yaml",
        remedy=f"did you mean {near[0]}?" if near else "run this in a checkout: overlays are in k8s/overlays" if not names else "",
    )  # fmt: skip


def template(folder: Path, name: str) -> dict[str, Any]:
    """The overlay's own RayJob of that name. Raises ConfigError."""
    jobs = {found.name: found.tree for found in build(folder).documents if isinstance(found, Document) and found.kind == "RayJob"}
    if name not in jobs:
        raise ConfigError("this overlay has no such job", where=str(folder), got=", ".join(jobs) or "no RayJob", wanted=f"RayJob/{name}")
    return jobs[name]


def require_there(recipe: Recipe, mounts: list[str]) -> None:
    """Raises ConfigError for a path of this machine: the pods do not have it."""
    paths = {"model.path": recipe.model.path} | {f"data.sources.{n}.path": source.path for n, source in enumerate(recipe.data.sources)}
    for key, path in paths.items():
        is_local = "://" not in path and not path.startswith("hf:")
        is_hub = key == "model.path" and not path.startswith((".", "/", "~")) and not Path(path).exists()
        if is_local and not is_hub and not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            raise ConfigError(
                "the pods do not have this path", where=key, got=path, wanted=f"below {' or '.join(mounts)}, or s3:// and the like",
                remedy=f"copy it there, and say {key}={mounts[-1]}/{Path(path).name}",
            )  # fmt: skip


def seen_from_here(recipe: Recipe, config: Path | None) -> Recipe:
    """For the forecast: the image's own files are this checkout's; of a model that lies in the cluster, `--config` has a copy."""
    path = recipe.model.path
    if config is not None:
        path = str(config)
    elif path.startswith(f"{IMAGE_AT}/"):
        path = str(OVERLAYS.parents[1] / path.removeprefix(f"{IMAGE_AT}/"))
    elif path.startswith("/") and not Path(path).exists():
        raise ConfigError(
            "this model cannot be counted from here", where="model.path", got=f"no {path} on this machine",
            remedy="give a folder with its config.json: --config DIR",
        )  # fmt: skip
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})


def pods_of(known: Forecast, nodes: Nodes) -> Pods:
    """Room for the forecast, and for a tenth above it. Raises ConfigError with the nearest recipe that fits in the overlay's GPUs."""
    asked = known.recipe.resources
    if nodes.gpus and not asked.gpus_per_worker:
        raise ConfigError(
            "this recipe leaves the overlay's GPUs alone", where="resources.gpus_per_worker", got="0", wanted="1 or more",
            remedy="add resources.gpus_per_worker=1, or take an overlay without GPUs",
        )  # fmt: skip
    if asked.gpus_per_worker and nodes.kind:
        known.require_fits(device_of(nodes.kind).memory_gib * min(1.0, asked.gpus_per_worker) * GIB)
    peak = known.need.host_peak / GIB + CUDA_GIB if known.need.on_gpu else known.need.peak / GIB
    return packed(asked, peak / TIGHT, nodes)


def run_of(recipe: Recipe, options: argparse.Namespace, pods: Pods) -> Run:
    files = {"recipe.yaml": options.recipe.read_text(encoding="utf-8")}
    script, words = "sft", [f"{RECIPE_AT}/recipe.yaml", *options.overrides]
    if options.search:
        load_search(options.search, [], {})  # a wrong one is refused here
        files["search.yaml"] = options.search.read_text(encoding="utf-8")
        script, words = "tune", [*words, "--search", f"{RECIPE_AT}/search.yaml"]
    name = options.name or job_name(recipe.name if not options.search else f"{recipe.name}-search")
    if name != job_name(name):
        raise ConfigError("this is no name for a RayJob", where="--name", got=name, wanted=f"like {job_name(name)}")
    return Run(name, shlex.join(["python", f"{IMAGE_AT}/pipelines/{script}.py", *words]), files, pods)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ftcore k8s render", description="Writes the RayJob of a recipe: pods, memory and GPUs by its forecast."
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like method.rank=32")
    parser.add_argument("--overlay", default="dev", help="of k8s/overlays, or a folder with a kustomization (dev)")
    parser.add_argument("--search", metavar="FILE", type=Path, help="a search around the recipe, as `ftcore tune --search` takes it")
    parser.add_argument("--name", help="of the RayJob (the recipe's)")
    parser.add_argument(
        "--config", metavar="DIR", type=Path, help="the model's config.json, where the model itself is in the cluster alone"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write there instead of to the terminal")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    from ftcore.cli import guarded

    sys.exit(guarded(main, sys.argv[1:]))
