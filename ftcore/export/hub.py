"""Hub: a sealed version pushed to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN), as a plain PEFT repository with its card.

In: a store, a ref, a repository id. Out: the commit's URL; or a clear error, offline above all. Runs in: the driver.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import StorageError


def push_to_hub(store: AdapterStore, ref: AdapterRef, repo_id: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Fetches (and so verifies) the version, then uploads it as one commit. Returns the commit's URL.

    Raises StorageError when the hub is not reachable, refuses, or `repo_id` is not one.
    """
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory(prefix="ftcore-hub-") as scratch:
        folder = store.fetch(ref, Path(scratch))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{ref}", commit_description=f"Version {ref.full}"
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise StorageError(
                "the hub did not take this adapter", where=f"{api.endpoint}/{repo_id}", got=str(error).strip().split("\n")[0][:300],
                remedy="check the network, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN (needs write access) and the repository's name",
            ) from error  # fmt: skip
    return str(commit.commit_url)
