"""Signing: Ed25519 over a card, so that a reader who knows the publisher's public key can tell who sealed a version.

In: a card, PEM key files. Out: the card with its signature; or an IntegrityError. Runs in: publish, verify, serving.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from ftcore.card import Card, Signature
from ftcore.errors import ConfigError, IntegrityError

PREFIX = b"ftcore adapter card v1\n"
"""Stands before the signed bytes, so that a signature made for anything else is none for a card."""


def keygen(private: Path, public: Path | None = None) -> str:
    """Makes a key pair (private file readable by its owner only); returns the key id. Refuses to overwrite."""
    public = public or private.with_suffix(".pub.pem")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for path, data, mode in (
        (private, secret, 0o600),
        (public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644),
    ):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        except FileExistsError as error:
            raise ConfigError(
                "there is a key file already", where=path, remedy="choose another name; a lost key cannot be made again"
            ) from error
    return key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex characters of SHA-256 over the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def sign_card(card: Card, key_path: str | Path) -> Card:
    """The card with a signature over everything else in it."""
    key = _private(Path(key_path))
    value = base64.b64encode(key.sign(PREFIX + card.signed_bytes())).decode()
    return card.model_copy(update={"signature": Signature(key_id=key_id(key.public_key()), value=value)})


def verify_card(card: Card, public_keys: Iterable[str | Path]) -> str:
    """Returns the id of the trusted key that signed. Raises IntegrityError without a signature, for an unknown key, or an altered card."""
    return require_signed(card, [public_key(*_file(Path(path))) for path in public_keys])


def require_signed(card: Card, public_keys: Iterable[Ed25519PublicKey]) -> str:
    """As `verify_card`, with keys that were read already."""
    if card.signature is None:
        raise IntegrityError(
            "this card is not signed", where=f"{card.tenant}/{card.name}@{card.digest[:12]}", remedy="publish with output.sign_key"
        )
    trusted = {key_id(key): key for key in public_keys}
    key = trusted.get(card.signature.key_id)
    if key is None or card.signature.algorithm != "ed25519":
        raise IntegrityError(
            "this card is signed by a key that is not trusted here", got=ascii(card.signature.key_id[:32]),
            wanted=", ".join(sorted(trusted)) or "a key",
            remedy="add the publisher's public key, if you trust them",
        )  # fmt: skip
    try:
        key.verify(base64.b64decode(card.signature.value, validate=True), PREFIX + card.signed_bytes())
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise IntegrityError(
            "this card was altered after it was signed", where=f"{card.tenant}/{card.name}@{card.digest[:12]}",
            remedy="fetch the version from where it was published",
        ) from error  # fmt: skip
    return card.signature.key_id


def _private(path: Path) -> Ed25519PrivateKey:
    key = _pem(*_file(path), lambda data: load_pem_private_key(data, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("this is not an Ed25519 private key", where=path, remedy="make one: ftcore adapters keygen FILE")
    return key


def read_public(path: Path) -> str:
    """The PEM text of a public key file. Raises ConfigError for anything else."""
    pem, _ = _file(path)
    public_key(pem, path)
    return pem.decode()


def public_key(pem: bytes, where: object) -> Ed25519PublicKey:
    """From a PEM text. Raises ConfigError that names `where` for anything else."""
    key = _pem(pem, where, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            "this is not an Ed25519 public key", where=where, remedy="give the .pub.pem file that `ftcore adapters keygen` wrote"
        )
    return key


def _file(path: Path) -> tuple[bytes, Path]:
    try:
        return path.read_bytes(), path
    except OSError as error:
        raise _unreadable(path, error) from error


def _pem(pem: bytes, where: object, load: Callable[[bytes], object]) -> object:
    try:
        return load(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # the message of a bad key never holds the key
        raise _unreadable(where, error) from error


def _unreadable(where: object, error: Exception) -> ConfigError:
    return ConfigError("this key cannot be read", where=where, got=type(error).__name__, wanted="a PEM file without a password")
