"""Places: whether what a run will write can be written, found out before any work, with one small object in each place.

In: a recipe. Out: nothing, or a StorageError that says which place refuses and what to do. Runs in: the driver.
"""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor

from ftcore.errors import StorageError
from ftcore.recipe import Recipe
from ftcore.storage import Folder

PROBE = b"ftcore looked whether it may write here; this can be removed\n"


def check_places(recipe: Recipe) -> None:
    """Creates, reads and removes a small object at the runs, the cache and (if it publishes) the store, all at once.

    Raises StorageError for the first that refuses: no such bucket, access refused, endpoint unreachable, no space.
    """
    places = {"output.runs": recipe.output.runs, "data.cache": recipe.data.cache}
    places |= {"output.store": recipe.output.store} if recipe.output.adapter else {}
    with ThreadPoolExecutor(len(places), "ftcore-places") as pool:
        for outcome in [pool.submit(check_place, key, url) for key, url in places.items()]:
            outcome.result()


def check_place(key: str, url: str) -> None:
    """The same for one place; `key` is what the message calls it."""
    folder, name = Folder(url), f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.write(name, PROBE)
        same = folder.read(name) == PROBE
        folder.delete(name)
    except StorageError as error:
        raised = StorageError(
            f"{key} cannot be used: {error.what}", where=error.where, got=error.got, wanted=error.wanted, remedy=error.remedy
        )
        raised.errno = error.errno
        raise raised from error
    if not same:
        raise StorageError(f"{key} does not give back what was written", where=url, remedy="check that storage, or choose another place")
