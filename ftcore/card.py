"""Card: what an adapter version is and where it came from. Written last into a version; its presence seals it.

In: facts of a run. Out: card.json, strict and frozen. Runs in: publish, serving, the command line; no torch.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, field_validator

import ftcore
from ftcore.adapter_files import CONTENT, FileFact, content_digest, max_bytes
from ftcore.errors import IntegrityError
from ftcore.section import Section
from ftcore.storage import canonical_json, digest_of

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Text = Annotated[str, StringConstraints(max_length=4096)]
MAX_BYTES = 4 * 1024**2
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "ray", "bitsandbytes", "deepspeed")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class BaseFacts(Section):
    """The base model the adapter belongs to."""

    id: Text
    """Folder or hub name it was loaded from."""
    revision: Text = "main"
    weights: Digest
    """`ftcore.weights.weights_digest` of its safetensors files."""
    dtype: Text
    """What it was held in while training."""
    quantisation: Text = "none"
    """How it was quantised while training ("none", "nf4, double quantised, computed in bf16")."""
    model_type: Text = ""


class QuantisationFacts(Section):
    """What quantising the base did: logits at the probes on the quantised base it was trained on, against the full-precision base."""

    how: Text
    """("nf4, double quantised, computed in bf16")"""
    difference_bare: float = Field(ge=0)
    """Largest difference of a logit of the bare base."""
    difference_tuned: float = Field(ge=0)
    """Largest difference of a logit with the adapter on."""
    effect: float = Field(ge=0)
    """Largest difference the adapter makes to the quantised base."""
    share: float = Field(ge=0)
    """difference_tuned / effect: near or above 1, the adapter means something else on a base that is not quantised."""


class DataFacts(Section):
    """The rows it learned from."""

    digest: Digest
    counts: dict[str, int | float] = Field(default_factory=dict)


class MethodFacts(Section):
    """What moved."""

    kind: Text
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[Text, ...] = ()
    num_trainable: int = 0
    """Numbers in the adapter's tensors."""


class RecipeFacts(Section):
    """The whole recipe, and its digest."""

    digest: Digest
    resolved: dict[str, Any]


class ProbeFacts(Section):
    """A precision the probes were recorded in."""

    device: Text
    effect: float | None
    """Largest difference of a logit that the adapter makes."""


class Signature(Section):
    """Ed25519 over the card without this field."""

    key_id: Text
    value: Text
    """Base64."""
    algorithm: Text = "ed25519"


class Card(Section):
    """Everything a later reader must know about one adapter version."""

    tenant: Name
    name: Name
    digest: Digest
    """Of the content files; names the version."""
    files: dict[str, FileFact]
    base: BaseFacts
    tokenizer: Digest
    template: Text
    """Digest of the chat template; empty where none was used."""
    data: DataFacts | None = None
    """None for an imported adapter: nobody knows."""
    recipe: RecipeFacts | None = None
    method: MethodFacts
    stage: Text = ""
    seed: int | None = None
    world_size: int | None = Field(None, ge=1)
    metrics: dict[str, float | int | str | None] = Field(default_factory=dict)
    quantisation: QuantisationFacts | None = None
    """None where the base was not quantised."""
    probes: dict[str, ProbeFacts]
    packages: dict[str, Text]
    parent: Text | None = None
    """`tenant/name@digest` it continues from."""
    created: Text
    """UTC, ISO 8601."""
    tool: Text = f"ftcore {ftcore.__version__}"
    signature: Signature | None = None

    @field_validator("files")
    @classmethod
    def _files_of_an_adapter(cls, files: dict[str, FileFact]) -> dict[str, FileFact]:
        """Names become paths, and sizes are made room for: before anything is copied they are an adapter's own."""
        for name, fact in files.items():
            if name not in CONTENT:
                raise ValueError(f"{ascii(name)[:80]} is no file of an adapter")
            if not 0 <= fact.bytes <= max_bytes(name):
                raise ValueError(f"{name}: {fact.bytes} bytes, of at most {max_bytes(name)}")
        return files

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    def signed_bytes(self) -> bytes:
        """What a signature covers: the canonical JSON of the card without its signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    @staticmethod
    def from_json(raw: bytes, where: object = "") -> Card:
        """Parses a card strictly. Raises IntegrityError when it is too large, not a card, or contradicts its own file list."""
        if len(raw) > MAX_BYTES:
            raise IntegrityError("this card is too large", where=where, got=f"{len(raw)} bytes", wanted=f"at most {MAX_BYTES}")
        try:
            card = Card.model_validate_json(raw)
        except (ValidationError, RecursionError) as error:
            raise IntegrityError(
                "this card cannot be read", where=where, got=printable(str(error))[:600], remedy="publish the version again"
            ) from error
        if content_digest(card.files) != card.digest:
            raise IntegrityError(
                "this card's file list is not the one its digest names", where=where, remedy="it was altered; publish the version again"
            )
        return card

    @staticmethod
    def read(path: Path) -> Card:
        return Card.from_json(path.read_bytes(), path)


def recipe_facts(resolved: dict[str, Any]) -> RecipeFacts:
    return RecipeFacts(digest=digest_of(resolved), resolved=resolved)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers, of those installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an optional one
    return found


def printable(text: object) -> str:
    """Text for a terminal: control, escape, bidirectional and zero-width characters shown as \\x.. so that a card cannot steer it."""
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), str(text))
