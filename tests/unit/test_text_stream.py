"""Text of an answer, piece by piece: the pieces are the whole, no half characters, no stop string however the tokens cut it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftcore.text_stream import HALF, TextStream

TEXTS = ["Open the report, then rename it.", "naïve café 今天天气 🙂🙃 end", "a\n\nb  c\td", "日本語だけ", "👩‍👩‍👧 family"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token) for token in ids] + [stream.end()]
    return pieces, stream.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole_and_never_half_a_character(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    pieces, stopped = streamed(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any(HALF in piece for piece in pieces)
    assert not stopped


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_of_a_stop_string_or_what_follows_is_shown(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids, rng = tokenizer(text)["input_ids"], random.Random(0)
    for _ in range(50):
        at = rng.randrange(len(text))
        stop = text[at : at + rng.randrange(1, 6)]
        pieces, stopped = streamed(tokenizer, ids, (stop, "never"))
        assert stopped
        assert "".join(pieces) == text[: text.index(stop)]


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, stopped = streamed(tokenizer, tokenizer("ends in STO")["input_ids"], ("STOP",))
    assert ("".join(pieces), stopped) == ("ends in STO", False)
    assert pieces[-1] == "STO"


def test_bytes_that_are_no_character_come_out_in_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("今")["input_ids"][:-1]
    pieces, _ = streamed(tokenizer, ids)
    assert pieces[:-1] == [""] * len(ids)
    assert set(pieces[-1]) == {HALF}
