"""Work: what each training worker does with the recipe that travelled to it as text.

In: the recipe, where its blocks and its run folder are, a Post. Out: the sealed result; journal lines said. Runs in: train workers,
without Ray.
"""

from __future__ import annotations

from cluster.outbox import Outbox
from ftcore.data.prepared import Prepared
from ftcore.nursery import Post
from ftcore.recipe import parse_recipe
from ftcore.rundir import RunDir

PRELOAD = (__name__, "ftcore.lean_imports", "ftcore.loop")
"""What a nursery imports before its first worker is asked for; the driver and the seats, who only pass the work on, never do."""


def work(recipe_yaml: str, plugins: tuple[str, ...], prepared_url: str, run: RunDir, post: Post) -> None:
    """The recipe is validated again, so that every process fills the same tables."""
    from ftcore.loop import train

    recipe = parse_recipe(recipe_yaml, plugins=plugins)
    outbox = Outbox(post.say)
    try:
        train(recipe, post.world, Prepared.open(prepared_url), run, outbox.add, post.should_stop)
    finally:
        outbox.flush()
