"""What every format must do, over the registry: a new one is tested the day it is written (give it an example row here)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore.data.formats.base import FORMATS, format, recognise, to_item
from ftcore.data.types import Conversation, Origin, Preference, Row, Text
from ftcore.errors import DataError

ORIGIN = Origin("rows.jsonl", 1)
EXAMPLES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    "messages": {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    "preference": {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    "text": {"text": "One and one are two."},
}
ITEMS = (Conversation, Text, Preference)
every_format = pytest.mark.parametrize("name", [name for name in FORMATS if name in EXAMPLES])


def row(value: dict[str, Any]) -> Row:
    return Row(value, ORIGIN)


@every_format
def test_a_format_makes_the_item_it_announces(name: str) -> None:
    item = to_item(row(EXAMPLES[name]), name)
    assert type(item) is FORMATS[name].item
    assert item.origin == ORIGIN


@every_format
def test_a_format_recognises_its_own_rows_and_says_why(name: str) -> None:
    found, reason = recognise([row(EXAMPLES[name])], FORMATS[name].item)
    assert found == name
    assert "in all of the first 1 rows" in reason


@every_format
def test_a_format_recognises_no_other_formats_rows(name: str) -> None:
    entry = FORMATS[name]
    assert [other for other, value in EXAMPLES.items() if FORMATS[other].item is entry.item and entry.recognises(value)] == [name]


@every_format
@pytest.mark.parametrize(
    "value", [{}, {"id": 1}, {"messages": 1, "conversations": 1, "instruction": 1, "output": 1, "text": 1, "chosen": 1, "rejected": 2}]
)
def test_a_format_rejects_what_it_cannot_read_with_a_reason(name: str, value: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        to_item(row(value), name)
    assert len(caught.value.what) < 60  # it is counted: the details belong in `got`


@every_format
def test_a_formats_items_hold_no_mutable_state_of_the_row(name: str) -> None:
    value = json.loads(json.dumps(EXAMPLES[name]))
    before = repr(to_item(row(value), name))
    item = to_item(row(value), name)
    value.clear()
    assert repr(item) == before


def test_a_format_is_one_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_items", dict(FORMATS.items()))

    @format("lyrics", item=Text, recognises=lambda value: "it has a `song`" if "song" in value else "")
    def lyrics(row: Row) -> Text:
        return Text(str(row.value["song"]), row.origin)

    assert recognise([row({"song": "la"})], Text)[0] == "lyrics"
    assert to_item(row({"song": "la"}), "lyrics") == Text("la", ORIGIN)


@pytest.mark.parametrize(
    ("file", "name", "item"), [("dpo_en_demo.json", "preference", Preference), ("alpaca_en_demo.json", "alpaca", Conversation)]
)
def test_public_rows_are_recognised(file: str, name: str, item: type) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / file
    if not path.is_file():
        pytest.skip("the public rows are not beside this checkout")
    rows = [row(value) for value in json.loads(path.read_text())]
    assert recognise(rows, item)[0] == name
    assert all(to_item(one, name) for one in rows)
