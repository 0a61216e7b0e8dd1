"""Published keys: the public halves of the replicas' receipt keys, in the store, so that a receipt can be checked when its replica is gone.

In: a key id and its PEM. Out: all of them. Runs in: replicas (publish), the ingress (list).
"""

from __future__ import annotations

import re

from ftcore.errors import StorageError
from ftcore.storage import Folder

HOME = "_receipts"
"""No tenant can have this name."""
FILE = re.compile(r"([0-9a-f]{16})\.pub\.pem")


def publish_key(store: str, key_id: str, pem: str) -> None:
    """Raises StorageError when it cannot be kept: a replica whose receipts nobody could check does not begin."""
    if not Folder(store).create(f"{HOME}/{key_id}.pub.pem", pem.encode()):
        raise StorageError("another replica has published this receipt key", where=store, got=key_id)


def published_keys(store: str) -> dict[str, str]:
    """Key id -> PEM."""
    folder = Folder(store) / HOME
    names = [match for name in folder.files() if (match := FILE.fullmatch(name))]
    return {match[1]: folder.read(match[0]).decode() for match in names}
