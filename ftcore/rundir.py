"""RunDir: the folder of one run, by its name, local or remote.

    recipe.yaml audit.json metrics.jsonl report.html curves.png checkpoints/step-000200/ final/ [parent/]

In: output.runs and the run's name. Out: its places. Runs in: the driver and train workers.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftcore.errors import IntegrityError, Interrupted
from ftcore.storage import MANIFEST, Folder, is_sealed, seal, verify

WRITER = "writer.json"


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
        if self.token and (not self.folder.exists(WRITER) or self.folder.read_json(WRITER)["token"] != self.token):
            raise Interrupted("another command has taken this run over", where=self.url, remedy="look there for its log")

    def is_finished(self) -> bool:
        return is_sealed(self.folder / "final")

    def checkpoint_steps(self) -> list[int]:
        """Steps of sealed checkpoints, ascending."""
        names = [name for name in self.folder.names("checkpoints") if name.startswith("step-")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit() and is_sealed(self.folder / f"checkpoints/{name}"))

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
        if self.folder.is_local:
            target = self.folder.path / key
            building = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        else:
            building = Path(tempfile.mkdtemp(prefix="ftcore-seal-")) / "folder"
        building.mkdir(parents=True)
        return building

    def put_in_place(
        self, building: Path, key: str, extra: dict[str, object] | None = None, others: dict[str, dict[str, object]] | None = None
    ) -> None:
        """Seals `building`, reads it back, and puts it at `key` as a whole.

        `others`: facts of the files that other writers have put under a remote `key` already (see `crew.seal_together`).
        """
        manifest = seal(Folder(building), extra)
        verify(Folder(building))
        self.refuse_if_taken()
        if self.folder.is_local:
            target = self.folder.path / key
            shutil.rmtree(target, ignore_errors=True)
            building.rename(target)
            return
        if others is None:
            self.folder.delete(key)
        else:
            Folder(building).write_json(MANIFEST, {**manifest, "files": {**manifest["files"], **others}})
        local = Folder(building)
        for name in [*(n for n in local.files() if n != MANIFEST), MANIFEST]:
            self.folder.put(building / name, f"{key}/{name}")
        verify(self.folder / key)

    def sweep(self) -> None:
        """Removes what a killed process left half-written. Only the one writer of a run may call this, before it writes."""
        if self.folder.is_local:
            for litter in [*self.folder.path.glob(".*.tmp"), *(self.folder.path / "checkpoints").glob(".*.tmp")]:
                shutil.rmtree(litter, ignore_errors=True)

    @contextmanager
    def opened(self, key: str) -> Iterator[Path]:
        """Yields a verified local copy of a sealed folder (the folder itself when it is local)."""
        folder = self.folder / key
        if folder.is_local:
            verify(folder)
            yield folder.path
            return
        with tempfile.TemporaryDirectory(prefix="ftcore-open-") as copy:
            for name in folder.files():
                folder.get(name, Path(copy) / name)
            verify(Folder(copy))
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


def checkpoint_key(step: int) -> str:
    return f"checkpoints/step-{step:06d}"
