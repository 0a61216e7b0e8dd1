"""Hub: a sealed version pushed to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN), as a plain PEFT repository with its card.

In: a store, a ref, a repository id. Out: the commit's URL; or a clear error, offline above all. Runs in: the driver.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ftcore.adapter_files import README
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import printable
from ftcore.errors import ConfigError, StorageError
from ftcore.export.modelcard import render_card

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push_to_hub(
    store: AdapterStore, ref: AdapterRef, repo_id: str, *, base_model: str | None = None, private: bool = True, endpoint: str | None = None
) -> str:
    """Fetches (and so verifies) the version, then uploads it as one commit. Returns the commit's URL.

    `base_model`: the base's name on the hub; needed where the adapter was trained on a folder, whose path means nothing there.
    Raises ConfigError without such a name, StorageError when the hub is not reachable, refuses, or `repo_id` is not one.
    """
    card = store.card(ref)
    named = base_model or card.base.id
    if not HUB_NAME.fullmatch(named) or (base_model is None and Path(named).exists()):
        raise ConfigError(
            "a hub needs the base's name there", where=ref, got=printable(named), wanted="owner/name", remedy="give it with --base-model"
        )
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory(prefix="ftcore-hub-") as scratch:
        folder = store.fetch(ref, Path(scratch))
        (folder / README).write_text(render_card(card, named), encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{ref}", commit_description=f"Version {ref.full}"
            )
        except Exception as error:  # the hub's client lets its HTTP library's errors through, and that library has changed its name
            raise StorageError(
                "the hub did not take this adapter", where=f"{api.endpoint}/{repo_id}", got=str(error).strip().split("\n")[0][:300],
                remedy="check the network, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN (needs write access) and the repository's name",
            ) from error  # fmt: skip
    return str(commit.commit_url)
