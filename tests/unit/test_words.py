"""What texts are cut into, and how the language is decided."""

# ruff: noqa: RUF001 (Chinese has marks of its own)

from __future__ import annotations

import random
import string

import pytest
from rouge_score.tokenizers import DefaultTokenizer

from ftcore.errors import ConfigError
from ftcore.evals.answered import Answered
from ftcore.evals.words import answer_words, read_as, words, words_and_marks


def asked(*references: str) -> list[Answered]:
    return [Answered(str(i), references=(reference,)) for i, reference in enumerate(references)]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Eiffel Tower!", "eiffel   tower"),
        ("a cat, an apple and the dog", "cat apple and dog"),
        ("U.S.", "us"),
        ("$1,000", "1000"),
        ("don't", "dont"),
        ("theatre", "Theatre."),
    ],
)
def test_english_answers_are_compared_as_squad_does(text: str, same: str) -> None:
    assert answer_words(text, "en") == answer_words(same, "en")


def test_what_squad_keeps_apart_stays_apart() -> None:
    assert answer_words("theatre", "en") != answer_words("atre", "en")
    assert answer_words("\u201cquoted\u201d", "en") != answer_words("quoted", "en")  # marks of ASCII only


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("《红楼梦》", "红楼梦"),
        ("北京，上海。", "北京上海"),
        ("北京 大学", "北京大学"),
        ("……是的！", "是的"),
        ("IPhone—12 手机", "iphone12手机"),
        ("1998\uff5e2000年", "19982000年"),
    ],
)
def test_chinese_answers_are_compared_without_marks(text: str, same: str) -> None:
    assert answer_words(text, "zh") == answer_words(same, "zh")


def test_every_mark_that_cmrc_drops_is_dropped() -> None:
    cmrc = "-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）\uff0d\uff5e『』"
    assert answer_words(f"一{cmrc}二", "zh") == ["一", "二"]


def test_chinese_is_cut_by_characters_and_other_words_stay_whole() -> None:
    assert answer_words("我用iPhone 12打电话", "zh") == ["我", "用", "iphone", "12", "打", "电", "话"]
    assert words("我用iPhone 12，打_电话") == ["我", "用", "iphone", "12", "打", "电", "话"]
    assert words_and_marks("好，OK_1!") == ["好", "，", "ok", "_", "1", "!"]


def test_on_ascii_the_words_are_those_of_rouge() -> None:
    rng, rouge = random.Random(0), DefaultTokenizer(use_stemmer=False)
    for _ in range(300):
        text = "".join(rng.choice(string.printable) for _ in range(60))
        assert words(text) == rouge.tokenize(text)


def test_letters_beyond_ascii_stay_in_their_words() -> None:
    assert words("Café Größe") == ["café", "größe"]


def test_the_language_is_decided_from_the_references() -> None:
    assert read_as(asked("the cat", "a dog said 你好")).language == "en"
    assert read_as(asked("今天用 PyTorch 训练模型")).language == "zh"
    assert str(read_as(asked("今天", "ab"))) == "zh: 50 % of the references' letters are Chinese"


def test_without_references_texts_are_read_as_english() -> None:
    assert (read_as([Answered("1", text="你好")]).language, str(read_as([]))) == ("en", "en")


def test_a_language_that_is_asked_for_is_taken() -> None:
    reading = read_as(asked("the cat"), "zh")
    assert (reading.language, str(reading)) == ("zh", "zh, as asked for")
    with pytest.raises(ConfigError, match=r"auto \| en \| zh"):
        read_as(asked("le chat"), "fr")
