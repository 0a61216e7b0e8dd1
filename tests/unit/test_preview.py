"""Preview shows what is trained, and nothing a row holds gets out of its text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from ftcore.data.chat import Chat
from ftcore.data.preview import Shown, Token, main, preview, to_html, tokens_of, visible
from ftcore.data.types import Conversation, Message, Origin
from ftcore.recipe import Data, Recipe, parse_recipe

EVIL = "</script><script>alert(1)</script> \x1b[31mred\x1b]8;;http://x\x07 \u202eevil \u2066 [link](http://x) [bold]b[/bold] &amp; \x9b"


def recipe_over(folder: Path, model: Path, *rows: object) -> Recipe:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(
        f"name: seen\nmodel: {{path: {model}}}\ndata: {{sources: {folder / 'rows.jsonl'}, redact: mask}}\nmethod: full\nstage: sft\n"
    )


def row(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def seen(recipe: Recipe, *, html: Path | None = None, colour: bool = False) -> str:
    out = io.StringIO()
    preview(
        recipe,
        3,
        html,
        console=Console(file=out, width=200, force_terminal=colour, color_system="truecolor" if colour else None, markup=True),
    )
    return out.getvalue()


def test_trained_tokens_stand_in_brackets(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = seen(recipe_over(tmp_path, tiny_model_dir, row("What is your name?", "Ada")))
    assert "<|im_start|>assistant↵\n⟦Ada<|im_end|>⟧↵" in text
    assert "format messages" in text
    assert "chat template: the tokenizer's own" in text


def test_rows_that_are_rejected_say_why(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = seen(recipe_over(tmp_path, tiny_model_dir, row("a", "b"), {"messages": [{"role": "assistant", "content": "hi"}]}))
    assert "rows.jsonl, row 2" in text
    assert "rejected: starts with the assistant" in text


@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal_gets_no_control_character_from_a_row(tmp_path: Path, tiny_model_dir: Path, colour: bool) -> None:
    text = seen(recipe_over(tmp_path, tiny_model_dir, row(EVIL, EVIL)), colour=colour)
    assert "\\x1b" in text.replace("\x1b[", "")
    for forbidden in ("\x1b[31mred", "\x1b]", "\x07", "\u202e", "\u2066", "\x9b"):
        assert forbidden not in text


def test_the_page_shows_markup_as_text_and_loads_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    seen(recipe_over(tmp_path, tiny_model_dir, row(EVIL, "Ada")), html=tmp_path / "out" / "page.html")
    page = (tmp_path / "out" / "page.html").read_text()
    for forbidden in ("<script", "\x1b", "\u202e", "\u2066", "src=", "href="):
        assert forbidden not in page
    assert "default-src 'none'" in page
    assert 'class="t0 assistant"' in page or 'class="t1 assistant"' in page


def test_the_page_escapes_tokens_titles_and_reasons() -> None:
    token = Token("<script>alert(1)</script>", (7,), "user", trained=False)
    page = to_html("<b>name", ["<b>head"], [Shown("<b>title", (token,)), Shown("a", rejected="<b>reason \x1b")])
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;reason \\x1b" in page


def test_what_redaction_masks_is_not_shown(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = seen(recipe_over(tmp_path, tiny_model_dir, row("mail me at ada@example.org", "done")))
    assert "ada@example.org" not in text
    assert "masked: email" in text


def test_characters_made_of_several_tokens_are_shown_whole(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    chat = Chat.open(tokenizer, data=Data.model_validate({"sources": "unused"}))
    talk = Conversation((Message("user", "日本語 😀"), Message("assistant", "é日")), Origin("a", 1))
    example = chat.encode(talk)
    tokens = list(tokens_of(example, tokenizer))
    assert "".join(token.text for token in tokens) == visible(tokenizer.decode(example.ids))
    assert not any("\ufffd" in token.text for token in tokens)
    assert [index for token in tokens for index in token.ids] == example.ids.tolist()


@pytest.mark.parametrize(
    ("text", "shown"), [("a\nb", "a↵\nb"), ("\x1b[0m", "\\x1b[0m"), ("\u200b", "\\u200b"), ("\ud800", "\\ud800"), ("日é", "日é")]
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_the_command_prints_rows_and_writes_the_page(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_over(tmp_path, tiny_model_dir, row("a", "b"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: seen\nmodel: {{path: {tiny_model_dir}}}\ndata: {{sources: {tmp_path / 'rows.jsonl'}}}\nmethod: full\nstage: sft\n"
    )
    assert main([str(recipe), "data.train_on=all", "--rows", "1", "--html", str(tmp_path / "p.html")]) == 0
    assert "⟦" in capsys.readouterr().out
    assert (tmp_path / "p.html").exists()
