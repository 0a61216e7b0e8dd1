"""Signatures: only an untouched card of a trusted key passes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ftcore.adapter_files import FileFact, content_digest
from ftcore.card import BaseFacts, Card, MethodFacts, Signature
from ftcore.errors import ConfigError, IntegrityError
from ftcore.signing import keygen, sign_card, verify_card

ZEROS = "0" * 64


@pytest.fixture
def card() -> Card:
    files = {"adapter_config.json": FileFact(sha256="1" * 64, bytes=2)}
    return Card(
        tenant="acme", name="support", digest=content_digest(files), files=files, base=BaseFacts(id="b", weights=ZEROS, dtype="fp32"),
        tokenizer=ZEROS, template="", method=MethodFacts(kind="lora"), probes={}, packages={}, created="now", metrics={"loss": 1.5},
    )  # fmt: skip


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path, str]:
    name = keygen(tmp_path / "key.pem")
    return tmp_path / "key.pem", tmp_path / "key.pub.pem", name


def test_a_signed_card_passes_for_its_key_even_after_a_round_trip(card: Card, keys: tuple[Path, Path, str]) -> None:
    private, public, name = keys
    signed = Card.from_json(sign_card(card, private).to_json())
    assert verify_card(signed, [public]) == name


@pytest.mark.parametrize("field", ["metrics", "created", "base", "parent", "seed"])
def test_an_altered_card_is_refused(card: Card, keys: tuple[Path, Path, str], field: str) -> None:
    private, public, _ = keys
    changes = {
        "metrics": {"loss": 0.1},
        "created": "then",
        "base": BaseFacts(id="c", weights=ZEROS, dtype="fp32"),
        "parent": "x",
        "seed": 1,
    }
    altered = sign_card(card, private).model_copy(update={field: changes[field]})
    with pytest.raises(IntegrityError, match="altered"):
        verify_card(altered, [public])


def test_an_unsigned_card_is_refused(card: Card, keys: tuple[Path, Path, str]) -> None:
    with pytest.raises(IntegrityError, match="not signed"):
        verify_card(card, [keys[1]])


def test_a_stranger_s_key_is_refused(card: Card, keys: tuple[Path, Path, str], tmp_path: Path) -> None:
    keygen(tmp_path / "stranger.pem")
    with pytest.raises(IntegrityError, match="not trusted"):
        verify_card(sign_card(card, tmp_path / "stranger.pem"), [keys[1]])


def test_a_trusted_key_s_name_over_a_stranger_s_signature_is_refused(card: Card, keys: tuple[Path, Path, str], tmp_path: Path) -> None:
    keygen(tmp_path / "stranger.pem")
    forged = sign_card(card, tmp_path / "stranger.pem")
    assert forged.signature is not None
    forged = forged.model_copy(update={"signature": Signature(key_id=keys[2], value=forged.signature.value)})
    with pytest.raises(IntegrityError, match="altered"):
        verify_card(forged, [keys[1]])


@pytest.mark.parametrize("value", ["", "!!!", "AAAA", "é"])
def test_a_signature_that_is_none_is_refused(card: Card, keys: tuple[Path, Path, str], value: str) -> None:
    broken = card.model_copy(update={"signature": Signature(key_id=keys[2], value=value)})
    with pytest.raises(IntegrityError):
        verify_card(broken, [keys[1]])


def test_the_private_key_is_its_owner_s_alone_and_never_overwritten(keys: tuple[Path, Path, str]) -> None:
    private = keys[0]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(ConfigError, match="already"):
        keygen(private)
    assert private.read_bytes() == before


def test_files_that_are_no_ed25519_keys_are_refused(card: Card, keys: tuple[Path, Path, str], tmp_path: Path) -> None:
    private, public, _ = keys
    other = X25519PrivateKey.generate()
    (tmp_path / "x.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "x.pub").write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for path in (tmp_path / "x.pem", public, tmp_path / "absent"):
        with pytest.raises(ConfigError):
            sign_card(card, path)
    for path in (tmp_path / "x.pub", private, tmp_path / "absent"):
        with pytest.raises(ConfigError):
            verify_card(sign_card(card, private), [path])
