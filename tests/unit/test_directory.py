"""Directory: the picture of a store that changes while it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcore.adapters import AdapterStore
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from serving.directory import Directory
from tests.oracles import make_adapter


def test_a_version_promoted_while_the_picture_is_taken_does_not_take_its_name_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refs = AdapterStore(tmp_path / "adapters"), []

    def publish(number: int) -> None:
        made = make_adapter(tiny_model_dir, tmp_path / f"made-{number}", number)
        refs.append(import_adapter(made, "acme/support", Model(path=str(tiny_model_dir)), store, log=lambda _: None))
        store.promote(refs[-1])

    publish(0)
    pointer, waiting = store.pointer, [1]

    def late(tenant: str, name: str) -> object:
        while waiting:  # after the listing, before the pointer is read
            publish(waiting.pop())
        return pointer(tenant, name)

    monkeypatch.setattr(store, "pointer", late)
    picture = Directory(store, lambda: ["acme"]).refresh()
    assert picture.find("acme", "support") == refs[1] != refs[0]


@pytest.mark.parametrize("is_away_first", [True, False])
def test_a_store_that_goes_or_comes_back_while_it_is_listed_is_not_taken_for_an_empty_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_away_first: bool
) -> None:
    store = AdapterStore(tmp_path / "adapters")
    made = make_adapter(tiny_model_dir, tmp_path / "made", 0)
    ref = import_adapter(made, "acme/support", Model(path=str(tiny_model_dir)), store, log=lambda _: None)
    store.promote(ref)
    directory = Directory(store, lambda: ["acme"])
    assert directory.refresh().find("acme", "support") == ref
    places = [tmp_path / "adapters", tmp_path / "elsewhere"]
    if is_away_first:
        places[0].rename(places[1])
        places.reverse()
    files = store.folder.files

    def moved_meanwhile(key: str) -> list[str]:
        places[0].rename(places[1]) if not is_away_first else None
        found = files(key)
        places[0].rename(places[1]) if is_away_first else None
        return found

    monkeypatch.setattr(store.folder, "files", moved_meanwhile)
    assert directory.refresh().find("acme", "support") == ref
    assert directory.problem == "there is nothing here"
