"""The adapter store, on a local folder and on an fsspec path (memory://): content names versions, the card seals, pointers swap whole."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftcore import adapters
from ftcore.adapter_files import FileFact, content_digest, content_files
from ftcore.adapters import MAX_CARD, AdapterRef, AdapterStore, split_ref
from ftcore.card import Card
from ftcore.errors import ConfigError, IntegrityError
from tests.adapter_folders import ZEROS, make_card, make_folder


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterStore]:
    yield AdapterStore(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}/store")


def publish(store: AdapterStore, folder: Path, value: float = 1.0, **names: str) -> AdapterRef:
    make_folder(folder, value)
    return store.publish(folder, make_card(folder, **names))


# ---- names


@pytest.mark.parametrize(
    "text", ["acme", "acme/", "/support", "../x", "acme/..", "acme/support@", "acme/support@../x", "Acme/support",
             "acme/sup port", "acme/support\n",
             "acme/a/b", "acme/s@x@y", "a" * 64 + "/b", "acme/\u202esupport", "acme\\x/y", ""],
)  # fmt: skip
def test_names_that_could_become_other_paths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        split_ref(text)


def test_a_ref_shows_twelve_characters_and_keeps_all(tmp_path: Path) -> None:
    ref = AdapterRef("acme", "support", "3f2a9c1d5e6f" + "0" * 52)
    assert str(ref) == "acme/support@3f2a9c1d5e6f"
    assert ref.full.endswith("0" * 52)


def test_a_ref_needs_a_whole_digest() -> None:
    with pytest.raises(ConfigError):
        AdapterRef("acme", "support", "3f2a9c")


# ---- publish and fetch


def test_a_published_version_comes_back_byte_for_byte(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    fetched = store.fetch(ref, tmp_path / "cache")
    for name in content_files(tmp_path / "a"):
        assert (fetched / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert Card.read(fetched / "card.json").digest == ref.digest
    assert "library_name: peft" in (fetched / "README.md").read_text()


def test_the_digest_is_over_the_list_of_names_and_hashes() -> None:
    import hashlib

    files = {"b": FileFact(sha256="22", bytes=1), "a": FileFact(sha256="11", bytes=1)}
    assert content_digest(files) == hashlib.sha256(b'[["a","11"],["b","22"]]').hexdigest()


def test_the_same_content_gives_the_same_ref_and_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    again = store.publish(tmp_path / "a", make_card(tmp_path / "a", created="2030-01-01T00:00:00+00:00"))
    assert again == ref
    assert store.card(ref).created.startswith("2026")


def test_a_folder_that_is_not_the_card_s_is_not_published(store: AdapterStore, tmp_path: Path) -> None:
    card = make_card(make_folder(tmp_path / "a"))
    with pytest.raises(IntegrityError, match="not the one its card describes"):
        store.publish(make_folder(tmp_path / "b", 2.0), card)
    assert store.list() == []


def test_an_unsealed_version_is_not_fetched_listed_or_resolved(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    store.folder.delete(f"{ref.key}/card.json")
    assert store.list() == []
    with pytest.raises(IntegrityError, match="no such sealed version"):
        store.fetch(ref, tmp_path / "cache")
    with pytest.raises(ConfigError):
        store.resolve(f"acme/support@{ref.digest[:8]}")


def test_a_flipped_bit_is_found_by_fetch_and_verify(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    key = f"{ref.key}/adapter_model.safetensors"
    raw = bytearray(store.folder.read(key))
    raw[-1] ^= 1
    store.folder.write(key, bytes(raw))
    with pytest.raises(IntegrityError, match="not the one that was published"):
        store.verify(ref)
    with pytest.raises(IntegrityError, match="not the one that was published"):
        store.fetch(ref, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_file_that_is_gone_is_found(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    store.folder.delete(f"{ref.key}/probes.json")
    with pytest.raises(IntegrityError, match=r"probes\.json"):
        store.fetch(ref, tmp_path / "cache")


def test_a_card_whose_file_list_was_rewritten_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    card = json.loads(store.folder.read(f"{ref.key}/card.json"))
    card["files"]["adapter_config.json"]["sha256"] = ZEROS
    store.folder.write(f"{ref.key}/card.json", json.dumps(card).encode())
    with pytest.raises(IntegrityError, match="file list"):
        store.fetch(ref, tmp_path / "cache")


def test_a_card_that_would_fill_the_memory_is_not_read(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    card = store.folder.read(f"{ref.key}/card.json")
    store.folder.write(f"{ref.key}/card.json", card + b" " * (MAX_CARD - len(card)))
    assert store.card(ref).digest == ref.digest
    store.folder.write(f"{ref.key}/card.json", card + b" " * (MAX_CARD + 1 - len(card)))
    with pytest.raises(IntegrityError, match="larger than"):
        store.fetch(ref, tmp_path / "cache")


def test_a_card_copied_under_another_name_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    other = AdapterRef("rival", "support", ref.digest)
    for name in store.folder.files(ref.key):
        store.folder.write(f"{other.key}/{name}", store.folder.read(f"{ref.key}/{name}"))
    with pytest.raises(IntegrityError, match="another version"):
        store.fetch(other, tmp_path / "cache")


def test_a_stranger_in_a_version_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    store.folder.write(f"{ref.key}/adapter_model.bin", b"pickle")
    with pytest.raises(IntegrityError, match="does not name"):
        store.fetch(ref, tmp_path / "cache")


def test_the_same_content_of_two_tenants_keeps_two_cards(store: AdapterStore, tmp_path: Path) -> None:
    mine = publish(store, tmp_path / "a")
    theirs = publish(store, tmp_path / "b", tenant="rival")
    assert mine.digest == theirs.digest
    assert [Card.read(store.fetch(ref, tmp_path / "cache") / "card.json").tenant for ref in (mine, theirs)] == ["acme", "rival"]


def test_an_altered_cache_is_not_taken_for_fetched(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    fetched = store.fetch(ref, tmp_path / "cache")
    (fetched / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(IntegrityError):
        store.fetch(ref, tmp_path / "cache")


# ---- names and pointers


def test_a_name_resolves_to_what_was_promoted(store: AdapterStore, tmp_path: Path) -> None:
    one, two = publish(store, tmp_path / "a"), publish(store, tmp_path / "b", 2.0)
    with pytest.raises(ConfigError, match="points at no version"):
        store.resolve("acme/support")
    store.promote(one)
    assert store.resolve("acme/support") == one
    store.promote(two)
    assert store.resolve("acme/support") == store.resolve("acme/support@current") == two
    assert store.resolve("acme/support@previous") == one
    assert store.resolve(f"acme/support@{one.digest[:8]}") == one
    assert store.resolve(two.full) == two


def test_rollback_returns_to_the_version_before(store: AdapterStore, tmp_path: Path) -> None:
    one, two = publish(store, tmp_path / "a"), publish(store, tmp_path / "b", 2.0)
    store.promote(one)
    store.promote(two)
    assert store.rollback("acme/support") == one
    with pytest.raises(ConfigError, match="nothing to roll back to"):
        store.rollback("acme/support")
    assert store.resolve("acme/support") == one


def test_rollback_passes_over_revoked_versions(store: AdapterStore, tmp_path: Path) -> None:
    one, two, three = (publish(store, tmp_path / str(i), float(i + 1)) for i in range(3))
    for ref in (one, two, three):
        store.promote(ref)
    store.revoke(two, "leaks")
    assert store.rollback("acme/support") == one


def test_promoting_the_current_version_again_leaves_the_history(store: AdapterStore, tmp_path: Path) -> None:
    one, two = publish(store, tmp_path / "a"), publish(store, tmp_path / "b", 2.0)
    for ref in (one, two, two):
        store.promote(ref)
    assert store.resolve("acme/support@previous") == one


def test_a_short_digest_that_fits_two_versions_is_refused(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = publish(store, tmp_path / "a")
    twin = AdapterRef("acme", "support", one.digest[:32] + "0" * 32)
    store.folder.write(f"{twin.key}/card.json", b"{}")
    with pytest.raises(ConfigError, match="several"):
        store.resolve(f"acme/support@{one.digest[:16]}")


def test_a_canary_takes_its_share_and_a_key_sticks(store: AdapterStore, tmp_path: Path) -> None:
    one, two = publish(store, tmp_path / "a"), publish(store, tmp_path / "b", 2.0)
    store.promote(one)
    store.promote(two, share=0.1)
    assert store.targets("acme", "support") == {one: pytest.approx(0.9), two: pytest.approx(0.1)}
    dealt = [store.pointer("acme", "support").pick("", f"conversation {i}") for i in range(4000)]
    assert dealt.count(two.digest) / 4000 == pytest.approx(0.1, abs=0.02)
    assert dealt[:50] == [store.pointer("acme", "support").pick("", f"conversation {i}") for i in range(50)]
    assert store.resolve("acme/support") == one


def test_an_alias_names_a_version(store: AdapterStore, tmp_path: Path) -> None:
    one = publish(store, tmp_path / "a")
    store.tag(one, "stable")
    assert store.resolve("acme/support@stable") == one
    for alias in ("abcdef", "current", "../x"):
        with pytest.raises(ConfigError):
            store.tag(one, alias)


def test_concurrent_promotions_lose_no_history(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    refs = [publish(store, tmp_path / str(i), float(i + 1)) for i in range(6)]
    threads = [threading.Thread(target=AdapterStore(tmp_path / "store").promote, args=(ref,)) for ref in refs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pointer = store.pointer("acme", "support")
    seen = {past.targets[0].digest for past in pointer.history} | {pointer.targets[0].digest}
    assert seen == {ref.digest for ref in refs}


def test_concurrent_publishers_of_one_content_both_succeed(tmp_path: Path) -> None:
    folder, found = make_folder(tmp_path / "a"), []
    card = make_card(folder)
    threads = [threading.Thread(target=lambda: found.append(AdapterStore(tmp_path / "store").publish(folder, card))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    AdapterStore(tmp_path / "store").verify(found[0])


# ---- ends


def test_a_revoked_version_is_neither_resolved_fetched_promoted_nor_published_again(store: AdapterStore, tmp_path: Path) -> None:
    ref = publish(store, tmp_path / "a")
    store.promote(ref)
    store.revoke(ref, "trained on private rows")
    for action in (lambda: store.resolve("acme/support"), lambda: store.fetch(ref, tmp_path / "c"), lambda: store.promote(ref),
                   lambda: store.publish(tmp_path / "a", make_card(tmp_path / "a"))):  # fmt: skip
        with pytest.raises(IntegrityError, match="revoked"):
            action()
    assert store.revocation(ref) == "trained on private rows"


def test_gc_says_what_would_go_and_removes_only_when_asked(store: AdapterStore, tmp_path: Path) -> None:
    refs = [publish(store, tmp_path / str(i), float(i + 1)) for i in range(5)]
    store.promote(refs[0])
    store.promote(refs[1])
    store.tag(refs[2], "stable")
    assert store.gc(keep_last=1) == [refs[3]]
    assert len(store.list()) == 5
    store.gc(keep_last=1, dry_run=False)
    assert store.list() == sorted([refs[0], refs[1], refs[2], refs[4]])
    assert not store.folder.exists(f"{refs[3].key}/adapter_config.json")


def test_gc_leaves_what_is_still_on_its_way_in(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = publish(store, tmp_path / "a")
    store.folder.delete(f"{ref.key}/card.json")
    assert store.gc() == []
    later = time.time() + adapters.YOUNG_S + 60
    monkeypatch.setattr(adapters.time, "time", lambda: later)
    assert store.gc(dry_run=False) == [ref]
    assert store.folder.names("acme/support/versions") == []


def test_listing_is_by_tenant(store: AdapterStore, tmp_path: Path) -> None:
    mine = publish(store, tmp_path / "a")
    theirs = publish(store, tmp_path / "b", 2.0, tenant="rival")
    assert store.list("acme") == [mine]
    assert store.list() == [mine, theirs]
    with pytest.raises(ConfigError):
        store.list("..")


def test_a_damaged_pointer_is_named(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    store.folder.write("acme/support/current.json", b'{"targets": [{"digest": "x"}]}')
    with pytest.raises(IntegrityError, match="pointer"):
        store.resolve("acme/support")
