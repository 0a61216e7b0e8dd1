"""RunDir: the folder of one run, by its name, local or remote.

    recipe.yaml audit.json metrics.jsonl report.html curves.png checkpoints/step-000200/ final/ [parent/]

In: output.runs and the run's name. Out: its places. Runs in: the driver and train workers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftcore.errors import IntegrityError, Interrupted, StorageError
from ftcore.storage import MANIFEST, Folder, fetch, is_sealed, seal, verify

log = logging.getLogger(__name__)
_SEALING = "ftcore-seal-"
LEASE = "lease.json"
"""Says which driver leads the run (see lease.py)."""


class RunDir:
    """`checkpoints/` and `final/` hold sealed folders only: they appear whole or not at all."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.root, self.name = str(root), name
        self.token = ""
        """Of the driver these processes work for; "" where nobody claims the run."""
        self.folder = Folder(root) / name
        if self.folder.is_local:  # workers may run in another directory than the driver
            self.root = str(Path(self.folder.url).resolve().parent)
            self.folder = Folder(Path(self.folder.url).resolve())

    @property
    def url(self) -> str:
        return self.folder.url

    def __reduce__(self) -> tuple[type[RunDir], tuple[str, str], dict[str, str]]:
        return RunDir, (self.root, self.name), {"token": self.token}

    def refuse_if_taken(self) -> None:
        """Raises Interrupted when another driver leads this run now: its workers are the writers, not this process."""
        if self.token and (not self.folder.exists(LEASE) or self.folder.read_json(LEASE)["token"] != self.token):
            raise Interrupted("another command has taken this run over", where=self.url, remedy="look there for its log")

    def is_finished(self) -> bool:
        return is_sealed(self.folder / "final")

    def checkpoint_steps(self) -> list[int]:
        """Steps of sealed checkpoints, ascending."""
        return sorted(int(name[5:]) for name, sealed in self._checkpoints().items() if sealed)

    def _checkpoints(self) -> dict[str, bool]:
        """Every checkpoint's folder, and whether it is sealed; one listing where the run is remote."""
        if self.folder.is_local:
            names = self.folder.names("checkpoints")
            found = {name: is_sealed(self.folder / f"checkpoints/{name}") for name in names}
        else:
            files = self.folder.files("checkpoints")
            found = {key.split("/")[0]: False for key in files}
            found |= {key.split("/")[0]: True for key in files if key.endswith(f"/{MANIFEST}") and key.count("/") == 1}
        return {name: sealed for name, sealed in found.items() if name.startswith("step-") and name[5:].isdigit()}

    @contextmanager
    def sealing(self, key: str, extra: dict[str, object] | None = None) -> Iterator[Path]:
        """Yields an empty local folder; on leaving it is sealed, read back against its digests, and put at `key` as a whole."""
        building = self.building(key)
        try:
            yield building
            self.put_in_place(building, key, extra)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def building(self, key: str) -> Path:
        """A new, empty local folder to write what is to be sealed at `key` into; its caller removes what is left of it."""
        if not self.folder.is_local:
            return Path(tempfile.mkdtemp(prefix=f"{_SEALING}{os.getpid()}-"))
        target = self.folder.path / key
        building = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        building.mkdir(parents=True)
        return building

    def put_in_place(
        self, building: Path, key: str, extra: dict[str, object] | None = None, others: dict[str, dict[str, object]] | None = None
    ) -> None:
        """Seals `building` and puts it at `key` as a whole; what lies there is read back against the digests.

        What was sealed at a remote `key` before is unsealed first: a reader finds the old manifest, none, or the new one, and holds every
        file against the one it read (`storage.fetch`), so it never takes a mixture for whole.
        `others`: facts of the files that other writers have put under a remote `key` already.
        """
        manifest = seal(Folder(building), extra)
        self.refuse_if_taken()
        if self.folder.is_local:
            verify(Folder(building))
            _exchange(building, self.folder.path / key)
            return
        if others is None:
            self.folder.delete(key)
        self.folder.at_once(lambda name: self.folder.put(building / name, f"{key}/{name}"), manifest["files"])
        self.folder.write_json(f"{key}/{MANIFEST}", {**manifest, "files": {**manifest["files"], **(others or {})}})
        verify(self.folder / key)

    def sweep(self) -> None:
        """Removes what a killed process left half-written. Only the one writer of a run may call this, before it writes."""
        if self.folder.is_local:
            for litter in [*self.folder.path.glob(".*.tmp"), *(self.folder.path / "checkpoints").glob(".*.tmp")]:
                if litter.is_dir():
                    shutil.rmtree(litter, ignore_errors=True)
                elif not litter.name.endswith(".lock.tmp"):  # the lease's lock stays: one removed while held would let two in
                    litter.unlink(missing_ok=True)
            return
        _sweep_local_copies()
        try:
            for name, sealed in self._checkpoints().items():
                if not sealed:
                    self.folder.delete(f"checkpoints/{name}")
            self.folder.abort_uploads()
        except StorageError as error:  # listing uploads is a right of its own; litter costs room, not the run
            log.warning("what a killed process left in %s could not be removed: %s", self.url, error)

    @contextmanager
    def opened(self, key: str) -> Iterator[Path]:
        """Yields a verified local copy of a sealed folder (the folder itself when it is local)."""
        folder = self.folder / key
        if folder.is_local:
            verify(folder)
            yield folder.path
            return
        with tempfile.TemporaryDirectory(prefix="ftcore-open-") as copy:
            fetch(folder, Path(copy))
            yield Path(copy)

    def newest_checkpoint(self, warn: object = None) -> int | None:
        """The newest step whose checkpoint is sealed and whose files are the ones that were sealed; damaged ones are passed over."""
        for step in reversed(self.checkpoint_steps()):
            try:
                verify(self.folder / checkpoint_key(step))
            except IntegrityError as error:
                if callable(warn):
                    warn(f"checkpoint of step {step} is damaged and passed over: {error}")
                continue
            return step
        return None


def _sweep_local_copies() -> None:
    """Removes what processes of this machine that are no more left of checkpoints on their way to remote storage."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SEALING}*-*"):
        pid = left.name.removeprefix(_SEALING).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            continue  # another user's, alive


def _exchange(building: Path, target: Path) -> None:
    """Puts a folder in another's place. The old one is moved out whole, not taken apart where a reader may look."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_key(step: int) -> str:
    return f"checkpoints/step-{step:06d}"
