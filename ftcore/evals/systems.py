"""Systems: who is judged: the bare base, the base with k examples, adapters, merged models, endpoints; each named as people type it.

In: words of a command line. Out: Systems, resolved and checked before anything is generated. Runs in: the driver.

    base                                 the recipe's base (or --base) alone; base+3: with 3 solved examples of the training split in front
    acme/support, acme/support@3f2a9c1   an adapter of the store; +3 as above
    ./merged                             a folder that holds a whole model
    http://127.0.0.1:8000/v1#support     any OpenAI-compatible endpoint, and the model to ask for
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcore.adapters import AdapterStore
from ftcore.errors import ConfigError, ModelError
from ftcore.evals.endpoint import Endpoint
from ftcore.speaker import Voice
from ftcore.storage import digest_of
from ftcore.weights import base_folder, check_base, weight_files, weights_digest

_SHOTS = re.compile(r"^(?P<who>.+)\+(?P<shots>\d+)$")
WANTED = "base, base+3, tenant/name[@digest], a model folder, or http://host:port/v1#model"


@dataclass(frozen=True)
class System:
    """One of those judged: a Voice, or an Endpoint."""

    name: str
    shots: int
    voice: Voice | None = None
    endpoint: Endpoint | None = None
    weights: str = ""
    """Digest of its base's weights."""
    num_bytes: int = 0
    """Of the adapter's files."""
    model_bytes: int = 0
    """Of the base's weights."""
    train_s: float | None = None
    """What training the adapter took, as its card says; None where it does not."""
    examples: str = ""
    """Digest of what it is shown; known once that is drawn."""

    @property
    def panel(self) -> str:
        """Systems of one panel are asked together: they share a base in memory, or an endpoint's URL."""
        if self.voice is not None:
            return f"{self.voice.base}@{self.voice.revision}"
        assert self.endpoint is not None
        return self.endpoint.url

    def facts(self) -> dict[str, Any]:
        """What makes its answers its own, wherever its base lies."""
        if self.endpoint is not None:
            return {"url": self.endpoint.url, "model": self.endpoint.model, "examples": self.examples}
        assert self.voice is not None
        return {"weights": self.weights, "adapter": self.voice.ref.digest if self.voice.ref else "", "examples": self.examples}

    @property
    def key(self) -> str:
        """The name of its folder of answers."""
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.name).strip('-')[:60]}-{digest_of(self.facts())[:8]}"


def resolve(words: Sequence[str], *, base: str, revision: str, store: str, key_variable: str, option: str = "--systems") -> list[System]:
    """Raises ConfigError or ModelError for one that is not there, does not fit its base, or stands there twice; `option`: where."""
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ConfigError("a system is named twice", where=option, got=", ".join(twice))
    return [_resolved(word, base, revision, store, key_variable, option) for word in words]


def _resolved(word: str, base: str, revision: str, store: str, key_variable: str, option: str) -> System:
    found = _SHOTS.match(word)
    who, shots = (found["who"], int(found["shots"])) if found else (word, 0)
    if who.startswith(("http://", "https://")):
        return System(word, shots, endpoint=Endpoint.parse(who, key_variable))
    if who == "base":
        if not base:
            raise ConfigError("which base?", where=f"{option} {word}", wanted="a recipe, or --base FOLDER")
        return _of_voice(word, shots, Voice(base, revision, store, None))
    if Path(who).is_dir():
        return _of_voice(word, shots, Voice(str(Path(who).absolute()), "main", store, None))
    if who.startswith((".", "/", "~")) or who.count("/") != 1:
        remedy = "" if "/" not in who else "a folder starts where the command runs"
        raise ConfigError("there is no such system", where=option, got=word, wanted=WANTED, remedy=remedy)
    return _of_voice(word, shots, Voice.find(who, store, base))


def _of_voice(word: str, shots: int, voice: Voice) -> System:
    if (Path(voice.base) / "adapter_config.json").is_file():
        raise ConfigError(
            "this folder holds an adapter, which is judged from the store", where=voice.base, wanted=WANTED,
            remedy=f"ftcore adapters import {voice.base} TENANT/NAME, then name that",
        )  # fmt: skip
    folder = base_folder(voice.base, voice.revision)
    check_base(folder)
    voice = replace(voice, base=str(folder.absolute()) if Path(voice.base).is_dir() else voice.base)
    weights, model_bytes = weights_digest(folder), sum(file.stat().st_size for file in weight_files(folder))
    if voice.ref is None:
        return System(word, shots, voice, weights=weights, model_bytes=model_bytes)
    card = AdapterStore(voice.store).card(voice.ref)
    if card.base.weights != weights:
        raise ModelError(
            "this adapter belongs to another base", where=f"--systems {word}", got=f"weights {weights[:12]} in {folder}",
            wanted=f"weights {card.base.weights[:12]}, those of {card.base.id}", remedy="judge it with its own base: --base FOLDER",
        )  # fmt: skip
    took = card.metrics.get("train_seconds")
    return System(
        word, shots, voice, weights=weights, num_bytes=sum(fact.bytes for fact in card.files.values()), model_bytes=model_bytes,
        train_s=took if isinstance(took, int | float) else None,
    )  # fmt: skip
