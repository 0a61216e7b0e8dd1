"""What each format makes of its rows, and which conversations are refused, for what reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftcore.data.formats.base import recognise, to_item
from ftcore.data.types import Conversation, Message, Origin, Preference, Row, Text
from ftcore.errors import DataError


def row(value: dict[str, Any], number: int = 1) -> Row:
    return Row(value, Origin("rows.jsonl", number))


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def turns_of(value: dict[str, Any], name: str) -> list[tuple[str, str]]:
    item = to_item(row(value), name)
    assert isinstance(item, Conversation)
    return [(message.role, message.content) for message in item.messages]


def test_alpaca_puts_input_below_the_instruction_and_history_before_it() -> None:
    value = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    assert turns_of(value, "alpaca") == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 + 1"), ("assistant", "2"),
    ]  # fmt: skip


def test_sharegpt_reads_system_tools_calls_and_observations() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "time", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "time", "parameters": {}}]',
    }
    item = to_item(row(value), "sharegpt")
    assert isinstance(item, Conversation)
    assert [message.role for message in item.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert item.messages[2].tool_calls == ({"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}},)
    assert item.tools == ({"type": "function", "function": {"name": "time", "parameters": {}}},)


def test_messages_keeps_weights_and_reads_call_arguments_from_their_json_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    value = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Noon.", "weight": 0},
        ]
    }
    item = to_item(row(value), "messages")
    assert isinstance(item, Conversation)
    assert item.messages[0] == Message("system", "Be brief.")
    assert item.messages[2].tool_calls[0]["function"]["arguments"] == {"zone": "UTC"}
    assert item.messages[3].tool_call_id == "c1"
    assert [message.weight for message in item.messages] == [None, None, None, None, 0]


def test_reasoning_is_put_before_the_answer_as_thinking() -> None:
    value = talk(("user", "1 + 1?"), ("assistant", "2"))
    value["messages"][1]["reasoning_content"] = "easy"
    assert turns_of(value, "messages")[1] == ("assistant", "<think>\neasy\n</think>\n\n2")


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {"instruction": "1 + 1?", "input": "", "chosen": "2", "rejected": "3"},
        {
            "conversations": [{"from": "human", "value": "1 + 1?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        {
            "prompt": [{"role": "user", "content": "1 + 1?"}],
            "chosen": [{"role": "assistant", "content": "2"}],
            "rejected": [{"role": "assistant", "content": "3"}],
        },
        {
            "chosen": talk(("user", "1 + 1?"), ("assistant", "2"))["messages"],
            "rejected": talk(("user", "1 + 1?"), ("assistant", "3"))["messages"],
        },
    ],
)
def test_preference_pairs_read_the_same_in_every_spelling(value: dict[str, Any]) -> None:
    item = to_item(row(value), "preference")
    assert item == Preference((Message("user", "1 + 1?"),), Message("assistant", "2"), Message("assistant", "3"), Origin("rows.jsonl", 1))


def test_a_document_is_kept_as_it_is() -> None:
    assert to_item(row({"text": " a\n"}), "text") == Text(" a\n", Origin("rows.jsonl", 1))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((), "no turns"),
        ((("assistant", "Hi"), ("user", "Hi")), "starts with the assistant"),
        ((("system", "x"), ("assistant", "Hi")), "starts with the assistant"),
        ((("user", "Hi"),), "no answer"),
        ((("user", "Hi"), ("assistant", " \n")), "empty answer"),
        ((("user", ""), ("assistant", "Hi")), "empty question"),
        ((("user", "Hi"), ("user", "Ho"), ("assistant", "Hi")), "two user turns in a row"),
        ((("user", "Hi"), ("assistant", "Hi"), ("assistant", "Ho")), "two answers in a row"),
        ((("user", "Hi"), ("tool", "x"), ("assistant", "Hi")), "a tool result with no answer before it"),
        ((("user", "Hi"), ("narrator", "x")), "unknown role"),
    ],
)
def test_a_conversation_that_cannot_be_right_is_rejected_for_a_reason(turns: tuple[tuple[str, str], ...], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        to_item(row(talk(*turns)), "messages")
    assert caught.value.what == reason


@pytest.mark.parametrize(
    "turns",
    [
        (("user", "Hi"), ("assistant", "Hi"), ("user", "and?")),
        (("user", "Hi"), ("system", "now be rude"), ("assistant", "No.")),
        (("user", "Hi"), ("assistant", "calling"), ("tool", "1"), ("tool", "2"), ("assistant", "Done.")),
    ],
)
def test_unusual_conversations_that_are_let_pass(turns: tuple[tuple[str, str], ...]) -> None:
    assert turns_of(talk(*turns), "messages") == list(turns)


def test_an_empty_answer_may_stand_when_it_is_not_trained() -> None:
    value = talk(("user", "Hi"), ("assistant", ""), ("user", "Hi?"), ("assistant", "Hi"))
    value["messages"][1]["weight"] = 0
    assert len(turns_of(value, "messages")) == 4


@pytest.mark.parametrize("content", [5, {"type": "image"}, [{"type": "image_url", "image_url": {}}]])
def test_content_that_is_not_text_is_rejected(content: Any) -> None:
    with pytest.raises(DataError, match="a turn is not text"):
        to_item(row({"messages": [{"role": "user", "content": content}]}), "messages")


def test_a_few_odd_rows_do_not_hide_the_format() -> None:
    rows = [row(talk(("user", "a"), ("assistant", "b")), number) for number in range(1, 8)] + [row({"oops": 1}, 8)]
    assert recognise(rows, Conversation) == ("messages", "it has `messages` with a `role` each (in 7 of the first 8 rows)")


def test_rows_of_another_stage_are_named_as_such() -> None:
    with pytest.raises(DataError, match="no known format of a Conversation") as caught:
        recognise([row({"text": "a document"})], Conversation)
    assert "this looks like text" in caught.value.remedy
    assert caught.value.where == "rows.jsonl, row 1"


def test_rows_that_two_formats_fit_must_be_named() -> None:
    both = {"instruction": "a", "output": "b", **talk(("user", "a"), ("assistant", "b"))}
    with pytest.raises(DataError, match="more than one format"):
        recognise([row(json.loads(json.dumps(both)))], Conversation)


def test_rows_wrapped_in_one_object_are_pointed_out() -> None:
    with pytest.raises(DataError, match="one object that holds the rows") as caught:
        recognise([row({"version": 1, "data": [talk(("user", "a"), ("assistant", "b"))]})], Conversation)
    assert "`data`" in caught.value.got
