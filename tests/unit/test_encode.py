"""What happens to an example longer than max_length, under each of the four rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ftcore.data.chat import Chat
from ftcore.data.encode import OverlongRefused, encode_item
from ftcore.data.types import Conversation, Example, Item, Message, Origin, Text
from ftcore.errors import DataError
from ftcore.recipe import Data
from ftcore.stages.pretrain import Pretrain
from ftcore.stages.sft import Sft

ORIGIN = Origin("rows.jsonl", 7)


@pytest.fixture(scope="module")
def chat(tiny_model_dir: Path) -> Chat:
    return Chat.open(AutoTokenizer.from_pretrained(tiny_model_dir), data=data("truncate"), template="auto", family="qwen2")


def data(overlong: str, max_length: int = 60) -> Data:
    return Data.model_validate({"sources": "unused.jsonl", "overlong": overlong, "max_length": max_length})


def encode(item: Item, chat: Chat, overlong: str, max_length: int = 60) -> list[Example]:
    stage = Pretrain(kind="pretrain") if isinstance(item, Text) else Sft(kind="sft")
    return encode_item(item, stage, chat, data(overlong, max_length))


def talk(*pairs: tuple[str, str], system: str = "") -> Conversation:
    turns = [Message("system", system)] if system else []
    for question, answer in pairs:
        turns += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(turns), ORIGIN)


LONG = talk(("what is your name?", "alpha beta gamma delta " * 20))


def text_of(example: Example, chat: Chat) -> str:
    return str(chat.tokenizer.decode(example.ids))


def test_refuse_stops_the_run_and_names_the_row(chat: Chat) -> None:
    with pytest.raises(OverlongRefused) as caught:
        encode(LONG, chat, "refuse")
    assert caught.value.where == "rows.jsonl, row 7"


def test_drop_rejects_the_row(chat: Chat) -> None:
    with pytest.raises(DataError, match="longer than max_length"):
        encode(LONG, chat, "drop")


def test_truncate_keeps_the_beginning_and_says_that_labels_were_lost(chat: Chat) -> None:
    (example,) = encode(LONG, chat, "truncate")
    assert (len(example.ids), example.truncated, example.num_answers, example.num_stopped) == (60, True, 1, 0)


def test_truncation_that_loses_no_label_does_not_count_as_truncated(chat: Chat) -> None:
    item = talk(("hi", "Ada"))
    longer = Conversation((*item.messages, Message("user", "alpha beta gamma " * 20)), ORIGIN)
    (example,) = encode(longer, chat, "truncate")
    assert (example.truncated, example.num_answers, example.num_stopped) == (False, 1, 1)


def test_an_example_left_without_labels_is_rejected(chat: Chat) -> None:
    with pytest.raises(DataError, match="no labels within max_length"):
        encode(talk(("alpha beta gamma " * 20, "Ada")), chat, "truncate")


def test_an_example_that_fits_is_the_same_under_every_rule(chat: Chat) -> None:
    found = [encode(talk(("hi", "Ada")), chat, rule)[0].ids.tolist() for rule in ("refuse", "drop", "truncate", "split")]
    assert found[0] == found[1] == found[2] == found[3]


def test_split_cuts_a_document_into_windows_that_lose_no_token(chat: Chat) -> None:
    whole = chat.encode_text(Text("alpha beta gamma delta " * 40, ORIGIN))
    parts = encode(Text("alpha beta gamma delta " * 40, ORIGIN), chat, "split", 50)
    assert np.concatenate([part.ids for part in parts]).tolist() == whole.ids.tolist()
    assert max(len(part.ids) for part in parts) == 50


def test_split_cuts_a_conversation_between_exchanges_and_repeats_the_system_turn(chat: Chat) -> None:
    item = talk(*[(f"question {number}", f"answer {number}") for number in range(8)], system="be brief")
    parts = encode(item, chat, "split", 120)
    texts = [text_of(part, chat) for part in parts]
    assert len(parts) > 1
    assert all(len(part.ids) <= 120 for part in parts)
    assert all(text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n") for text in texts)
    assert [sum(f"answer {number}<" in text for text in texts) for number in range(8)] == [1] * 8
    assert sum(part.num_stopped for part in parts) == sum(part.num_answers for part in parts) == 8


def test_split_cuts_one_exchange_that_is_too_long_into_token_windows(chat: Chat) -> None:
    whole = chat.encode(LONG)
    parts = encode(LONG, chat, "split")
    assert np.concatenate([part.ids for part in parts]).tolist() == whole.ids.tolist()
    assert sum(part.num_stopped for part in parts) == 1


def test_a_row_without_any_label_is_rejected(chat: Chat) -> None:
    turns = (Message("user", "hi"), Message("assistant", "Ada", weight=0))
    with pytest.raises(DataError) as caught:
        encode(Conversation(turns, ORIGIN), chat, "truncate")
    assert caught.value.what == "no labels"
