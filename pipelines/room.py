"""Room: whether what a run is forecast to need is there, asked before anything of it is started.

In: a recipe. Out: a sentence, or a refusal with the nearest recipe that fits. Runs in: the driver; no torch, and no ray but on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.runtime_env import joins_cluster
from cluster.worker_memory import Share, share_here
from ftcore.errors import ConfigError, FtcoreError
from ftcore.forecast import Forecast, forecast
from ftcore.memory import GIB
from ftcore.recipe import Recipe, Resources

Log = Callable[[str], None]


def require_room(recipe: Recipe, log: Log) -> None:
    """Raises ConfigError when a worker cannot fit where it will sit. What cannot be forecast is no reason not to train: a line says so."""
    try:
        known = forecast(recipe)
    except FtcoreError as error:
        log(f"no forecast of its memory: {error.what}{f' ({error.got})' if error.got else ''}")
        return
    judge(known, share_for(recipe.resources, log), log)


def judge(known: Forecast, share: Share, log: Log) -> None:
    """Raises ConfigError when the forecast is above the share. One that nobody knows refuses nothing."""
    peak = known.need.peak / GIB
    if share.gib is None:
        log(f"forecast: a worker takes {peak:.2f} GiB; not judged: {share.source}")
        return
    try:
        known.require_fits(share.gib * GIB, share.hosts)
    except ConfigError as error:
        remedy = f"{error.remedy}   (more ways: ftcore plan; --no-plan tries it all the same)"
        source = f" ({share.source})" if known.need.peak > share.gib * GIB else ""  # of a host the error says it
        raise ConfigError(error.what, where=error.where, got=f"{error.got}{source}", wanted=error.wanted, remedy=remedy) from error
    tight = "; that is tight" if known.verdict(share.gib * GIB, share.hosts) == "tight" else ""
    host = known.fullest(share.hosts)
    beside = f"; on its host {host.takes(known.need):.2f} of {host.gib:.2f} GiB" if host else ""
    log(f"forecast: a worker takes {peak:.2f} of {share.gib:.2f} GiB ({share.source}){beside}{tight}")


def share_for(asked: Resources, log: Log) -> Share:
    """What one such worker may take where they will all sit: on this machine, or on the cluster."""
    if not joins_cluster():
        return share_here(asked)
    from cluster.connect import connect  # what a run on this machine is refused without
    from cluster.preflight import share_on_cluster

    connect(log=log)
    return share_on_cluster(asked)
