"""Receipts: a signed statement of which weights gave which answer, that anyone can check and only the server can make.

In: request id, adapter and base digests, the answer. Out: a Receipt; or an IntegrityError when one does not hold. Runs in: serving
replicas (sign), `ftcore verify-receipt` (check); no torch.

Ed25519 over the canonical JSON of the receipt without its signature, behind a prefix of its own. Before an answer ends, the engine holds
the weights in the slot that computed it to those it read from the version's verified files; an answer from anything else is withdrawn.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from ftcore.card import Digest, Text, utc_now
from ftcore.errors import IntegrityError
from ftcore.section import Section
from ftcore.signing import key_id
from ftcore.storage import canonical_json

S = TypeVar("S", bound="Statement")
Said = str | dict[str, Any]
"""One choice: its text; or what `said` gives where it calls tools."""


class Statement(Section):
    """What a process says under its key. The prefix stands before the signed bytes: a signature for one kind is none for another."""

    PREFIX: ClassVar[bytes]
    time: Text
    key: Text
    signature: Text = ""

    def signed_bytes(self) -> bytes:
        return self.PREFIX + canonical_json(self.model_dump(mode="json", exclude={"signature"}))


class Receipt(Statement):
    """What was answered by what."""

    PREFIX = b"ftcore receipt v1\n"
    request: Text
    tenant: Text
    adapter: Text
    """`tenant/name@digest` in full; empty for the bare base."""
    base: Digest
    output: Digest
    """SHA-256 over the canonical JSON of the list of the choices."""


def said(content: str, calls: Sequence[tuple[str, str]]) -> Said:
    """A choice with its calls: (name, arguments)."""
    return {"content": content, "tool_calls": [list(call) for call in calls]} if calls else content


def said_vector(values: bytes) -> Said:
    """An embedding: its fp32 values, little-endian, in base64."""
    return base64.b64encode(values).decode()


def output_digest(texts: Sequence[Said]) -> str:
    return hashlib.sha256(canonical_json(list(texts))).hexdigest()


class Signer:
    """One process's key, which never leaves it."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.key_id = key_id(self._key.public_key())
        self.public_pem = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def sign(self, request: str, tenant: str, adapter: str, base: str, texts: Sequence[Said]) -> Receipt:
        receipt = Receipt(
            request=request, tenant=tenant, adapter=adapter, base=base, output=output_digest(texts), time=utc_now(), key=self.key_id
        )
        return self.signed(receipt)

    def signed(self, statement: S) -> S:
        return statement.model_copy(update={"signature": base64.b64encode(self._key.sign(statement.signed_bytes())).decode()})


def verify_receipt(receipt: Receipt, texts: Sequence[Said], public_keys: Mapping[str, str]) -> None:
    """`public_keys`: key id -> PEM. Raises IntegrityError when the answer, any field or the signature is not what was signed."""
    if output_digest(texts) != receipt.output:
        raise IntegrityError("this is not the answer that the receipt is for", got=output_digest(texts)[:12], wanted=receipt.output[:12])
    require_signature(receipt, public_keys, f"receipt {receipt.request[:80]}")


def require_signature(statement: Statement, public_keys: Mapping[str, str], what: str) -> None:
    """Raises IntegrityError unless the key that the statement names is among `public_keys` and signed it."""
    pem = public_keys.get(statement.key)
    key = load_pem_public_key(pem.encode()) if pem is not None else None
    if not isinstance(key, Ed25519PublicKey) or key_id(key) != statement.key:
        raise IntegrityError(
            "this is signed by a key that is not known", where=what, got=statement.key[:32],
            wanted="a key of /v1/receipt-keys",
        )  # fmt: skip
    try:
        key.verify(base64.b64decode(statement.signature, validate=True), statement.signed_bytes())
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise IntegrityError("this was altered after it was signed", where=what) from error
