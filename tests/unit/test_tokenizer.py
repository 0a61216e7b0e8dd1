"""Opening tokenizers and naming them by content; which family a model belongs to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from transformers import AddedToken

from ftcore.data.families import GENERIC, family_of
from ftcore.data.tokenizer import load_tokenizer, longest_token, tokenizer_digest
from ftcore.errors import ConfigError, ModelError
from ftcore.recipe import Model
from ftcore.served_base import ServedBase


def test_a_copy_elsewhere_has_the_same_digest_whatever_its_template_or_padding(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    here, there = load_tokenizer(Model(path=str(tiny_model_dir))), load_tokenizer(Model(path=str(tmp_path / "copy")))
    there.chat_template = "other"
    there(["a", "b c d e f"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(here) == tokenizer_digest(there)


def test_an_added_token_changes_the_digest(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_model_dir)))
    before = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before


def test_another_stop_token_changes_the_digest(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_model_dir)))
    before = tokenizer_digest(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer_digest(tokenizer) != before


@pytest.mark.parametrize("path", ["./no-such-folder", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(path: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_tokenizer(Model(path=path))


def test_a_folder_without_a_tokenizer_is_said_to_hold_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_a_damaged_tokenizer_is_a_model_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match="cannot open the tokenizer"):
        load_tokenizer(Model(path=str(tmp_path / "copy")))


def test_a_hub_name_without_a_hub_is_a_model_error_that_says_what_to_check() -> None:
    with pytest.raises(ModelError, match="cannot open the tokenizer") as caught:
        load_tokenizer(Model(path="nobody/never-made-this"))
    assert "HF_ENDPOINT" in caught.value.remedy


@pytest.mark.parametrize(
    ("model_type", "target", "template"),
    [
        ("llama", "q_proj", "llama3"), ("mistral", "q_proj", "mistral"), ("qwen", "c_attn", "chatml"), ("qwen2", "q_proj", "chatml"),
        ("qwen3", "gate_proj", "chatml"), ("baichuan", "W_pack", "baichuan2"), ("chatglm", "query_key_value", "chatglm3"),
        ("bloom", "query_key_value", "alpaca"), ("falcon", "query_key_value", "alpaca"), ("gemma2", "q_proj", "gemma"),
        ("phi3", "qkv_proj", "phi3"),
    ],
)  # fmt: skip
def test_families_follow_the_catalogue(model_type: str, target: str, template: str) -> None:
    family = family_of(model_type)
    assert target in family.targets
    assert family.template == template


def test_an_unknown_architecture_gets_all_linear_layers() -> None:
    assert family_of("never-heard-of") is GENERIC
    assert GENERIC.targets == ("all-linear",)


def test_the_longest_token_bounds_what_a_text_can_be_short_of_or_nothing_does(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_model_dir)))
    longest = longest_token(tokenizer)
    assert longest == max(len(word) for word in tokenizer.get_vocab())
    for text in ("a b c " * 50, "\n" * 200, "表示" * 40, "e\u0301" * 90, "".join(tokenizer.get_vocab())):
        assert len(normalize("NFC", text)) <= longest * len(tokenizer(text)["input_ids"])
    tokenizer.add_tokens([AddedToken("<gap>", lstrip=True)])
    assert longest_token(tokenizer) == 0, "it takes any number of blanks with it"


def test_what_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    base: Any = object.__new__(ServedBase)
    base.longest_token, base.tokenizer = 4, lambda text: {"input_ids": [len(text)]}
    assert base.text_prompt("x" * 40, 10) == (40,) and base.text_prompt("x" * 99) == (99,)
    assert base.text_prompt("e\u0301" * 40, 10) == (80,), "the tokenizer puts the two together"
    with pytest.raises(ConfigError, match="does not fit"):
        base.text_prompt("x" * 41, 10)
