"""Search room: whether the largest trials of a search fit where they will sit, as many beside each other as will run at once.

In: a Search, the recipe around it. Out: a sentence, or a refusal with what would fit. Runs in: the driver, before any trial; no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cluster.connect import connect, local_num_cpus
from cluster.node_facts import node_facts
from cluster.resources import Node, alive_nodes, fits
from cluster.runtime_env import joins_cluster
from cluster.worker_memory import Share
from ftcore.errors import ConfigError, FtcoreError
from ftcore.forecast import Forecast, forecast, pasted
from ftcore.memory import GIB
from ftcore.recipe import Recipe, Resources
from ftcore.search import Search, recipe_of
from ftcore.trials import shown_values
from pipelines.room import Log, judge, share_for


@dataclass(frozen=True)
class Crowd:
    """The largest trial of a search, `said` so often at once, and what a worker of it may take."""

    known: Forecast
    share: Share
    said: str

    @property
    def fits(self) -> bool:
        return self.share.gib is None or self.known.verdict(self.share.gib * GIB, self.share.hosts) != "does not fit"


def require_search_room(search: Search, recipe: Recipe, shares: bool, log: Log) -> None:
    """`shares`: trials share a base (ftcore.search.check). Raises ConfigError when the largest cannot fit, or not so many at once."""
    asked = recipe.resources.model_copy(update={"workers": 1 if shares else recipe.resources.min_workers})
    found = _largest(search, recipe.model_copy(update={"resources": asked}), log)
    if found is None:
        return
    known, values = found
    room = max(1, _places(asked, log) // asked.max_workers)
    share_of = cache(lambda processes: share_for(asked.model_copy(update={"workers": processes * asked.max_workers}), log))

    def crowd(at_once: int) -> Crowd:
        processes = min(room, at_once)
        guests = math.ceil(at_once / processes)
        said = f"{at_once} trials at once, {guests} to a base, the largest with {shown_values(values)}"
        return Crowd(replace(known, need=known.need.of_trials(processes, guests)), share_of(processes), said)

    wanted = min(room * (search.together if shares else 1), search.most_at_once, search.num_trials)
    whole = crowd(wanted)
    try:
        judge(whole.known, whole.share, lambda line: log(f"{line}: {whole.said}"))
    except ConfigError as error:
        fewer = next((at_once for at_once in range(wanted - 1, 0, -1) if crowd(at_once).fits), 0)
        remedy = f"--concurrent {fewer}" if fewer else _smaller(search, known, crowd(1).share)
        raise ConfigError(
            "this search needs more memory than there is", where=f"{whole.said}; {error.where}", got=error.got, wanted=error.wanted,
            remedy=f"{remedy}   (--no-plan tries it all the same)",
        ) from error  # fmt: skip


def _largest(search: Search, recipe: Recipe, log: Log) -> tuple[Forecast, dict[str, Any]] | None:
    """Key by key the end that takes most, given those before. None, and a line, where nothing can be forecast."""
    values = {path: span.samples()[0] for path, span in search.free.items()}
    best, refusal = None, ""
    for path, span in search.free.items():
        for value in span.samples():
            tried = values | {path: value}
            try:
                known = forecast(recipe_of(search, recipe, tried))
            except FtcoreError as error:
                refusal = f"{error.what}{f' ({error.got})' if error.got else ''}"
                continue
            if best is None or known.need.peak > best.need.peak:
                best, values = known, tried
    if best is None:
        log(f"no forecast of its memory: {refusal}")
        return None
    return best, values


def _places(asked: Resources, log: Log) -> int:
    """How many such workers run at once: of this machine, or of the cluster."""
    if not joins_cluster():
        return fits(asked, [Node("", local_num_cpus(), len(node_facts().gpus))])
    connect(log=log)
    return fits(asked, alive_nodes())


def _smaller(search: Search, known: Forecast, share: Share) -> str:
    """Where not even one such trial fits."""
    found = known.nearest((share.gib or 0.0) * GIB, share.hosts)
    searched = {path.split(".")[0] for path in search.space}
    if found is None or any(text.split(".")[0] in searched for text in found.overrides):
        return "leave its largest values out of the space, or take a smaller model"
    return pasted(found)
