"""Preview: rows token by token, coloured by trained or not, in the terminal and as one self-contained HTML page.

In: a recipe. Out: what training would see of its first rows. Runs in: a person's terminal; no torch, no ray.

Everything from rows is shown as text and nothing else: control characters, terminal escapes, bidirectional marks and HTML are written out.
"""

from __future__ import annotations

import argparse
import html as html_text
import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text as Line

from ftcore.data.chat import Chat
from ftcore.data.encode import encode_item
from ftcore.data.formats.base import recognise, to_item
from ftcore.data.identity import model_type
from ftcore.data.read import plan, read
from ftcore.data.redact import redact_item
from ftcore.data.tokenizer import load_tokenizer
from ftcore.data.types import ROLES, Example, Rejected, Row
from ftcore.errors import DataError
from ftcore.recipe import Recipe, load_recipe
from ftcore.storage import explain_oserror

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD_ROWS = 32
_LONGEST_PIECE = 8
"""Tokens that may share one character (bytes of it); more is not text anyway."""
TRAINED_STYLES, OTHER_STYLES = ("black on green3", "black on dark_sea_green2"), ("grey50", "grey66")
"""Neighbouring tokens alternate between the two, so that one sees where each begins."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a person sees it (several, where they only together make a character)."""

    text: str
    ids: tuple[int, ...]
    role: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """A row: its examples as tokens, or why it is rejected."""

    title: str
    tokens: tuple[Token, ...] = ()
    rejected: str = ""


def preview(recipe: Recipe, rows: int = 3, html: Path | None = None, *, console: Console | None = None) -> None:
    """Prints the first `rows` rows of every source as training would see them; writes the same to `html` if given."""
    tokenizer = load_tokenizer(recipe.model)
    chat = Chat.open(tokenizer, data=recipe.data, template=recipe.model.chat_template, family=model_type(recipe.model))
    heads, shown = [chat.describe()], []
    for source in range(len(recipe.data.sources)):
        reason, some = _first_rows(recipe, source, rows, chat, tokenizer)
        heads.append(reason)
        shown += some
    to_terminal(heads, shown, console or Console(highlight=False, markup=False, emoji=False))
    if html is not None:
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(to_html(recipe.name, heads, shown), encoding="utf-8")
        except OSError as error:
            raise explain_oserror(error, "write", str(html)) from error


def _first_rows(recipe: Recipe, source: int, rows: int, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Shown]]:
    """(how the source reads, its first rows)."""
    place = recipe.data.sources[source]
    pieces = plan(recipe.data.sources[source : source + 1])
    head = list(itertools.islice(itertools.chain.from_iterable(read(piece) for piece in pieces), max(rows, _HEAD_ROWS)))
    name, reason = place.format, "the recipe names it"
    good = [row for row in head if isinstance(row, Row)]
    if name == "auto" and good:
        name, reason = recognise(good, recipe.stage.item)
    shown = [show for row in head[:rows] for show in _row(row, name, recipe, chat, tokenizer)]
    return f"{place.path}: format {name}, because {reason}", shown


def _row(row: Row | Rejected, name: str, recipe: Recipe, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[Shown]:
    if isinstance(row, Rejected):
        yield Shown(str(row.origin), rejected=": ".join(filter(None, (row.reason, row.detail))))
        return
    try:
        item = to_item(row, name)
        found: list[str] = []
        if recipe.data.redact != "off":
            item, found = redact_item(item, masked=recipe.data.redact == "mask")
        examples = encode_item(item, recipe.stage, chat, recipe.data)
    except DataError as error:
        yield Shown(str(row.origin), rejected=": ".join(filter(None, (error.what, error.got))))
        return
    for i, example in enumerate(examples):
        facts = [f"{len(example.ids)} tokens", f"{example.num_trained} trained"]
        facts += [f"example {i + 1} of {len(examples)}"] if len(examples) > 1 else []
        facts += ["labels cut off by max_length"] if example.truncated else []
        facts += [f"{'masked' if recipe.data.redact == 'mask' else 'holds'}: {', '.join(sorted(set(found)))}"] if found else []
        yield Shown(f"{row.origin}: {', '.join(facts)}", tuple(tokens_of(example, tokenizer)))


def tokens_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    """The example's tokens with the text each adds after the one before it."""

    def added(before: np.ndarray, ids: np.ndarray) -> str:
        first, whole = decoded(before), decoded(np.concatenate([before, ids]))
        return whole[len(first) :] if whole.startswith(first) else decoded(ids)

    def decoded(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if len(ids) else ""

    start, before = 0, example.ids[:0]
    while start < len(example.ids):
        end = start + 1
        text = added(before, example.ids[start:end])
        while text.endswith("\ufffd") and end < min(len(example.ids), start + _LONGEST_PIECE):
            end += 1
            text = added(before, example.ids[start:end])
        piece = example.ids[start:end]
        yield Token(visible(text), tuple(piece.tolist()), ROLES[example.roles[start]], bool(example.mask[start:end].any()))
        start, before = end, piece


def visible(text: str) -> str:
    """Text with everything that is not plainly seen written out: line ends and tabs as arrows, controls, format and bidirectional
    characters and lone surrogates by their code."""
    return "".join(_seen(char) for char in text)


def to_terminal(heads: list[str], shown: list[Shown], console: Console) -> None:
    """Trained tokens stand on green and, for those who see no colours, between brackets."""
    for head in heads:
        console.print(Line(visible(head), style="italic"), soft_wrap=True)
    for row in shown:
        console.print(Line(f"\n── {visible(row.title)}", style="bold"), soft_wrap=True)
        if row.rejected:
            console.print(Line(f"rejected: {visible(row.rejected)}", style="red"), soft_wrap=True)
            continue
        line, was_trained = Line(), False
        for i, token in enumerate(row.tokens):
            if token.trained != was_trained:
                line.append("⟦" if token.trained else "⟧", style="bold green")
                was_trained = token.trained
            line.append(token.text, style=(TRAINED_STYLES if token.trained else OTHER_STYLES)[i % 2])
        line.append("⟧" if was_trained else "", style="bold green")
        console.print(line, soft_wrap=True)


def to_html(name: str, heads: list[str], shown: list[Shown]) -> str:
    """One page, nothing loaded from elsewhere, no script."""
    body = [f"<p>{_escaped(head)}</p>" for head in heads]
    for row in shown:
        body.append(f"<h2>{_escaped(row.title)}</h2>")
        body.append(f'<p class="rejected">rejected: {_escaped(row.rejected)}</p>' if row.rejected else f"<pre>{_spans(row.tokens)}</pre>")
    return _PAGE.replace("@NAME@", _escaped(name)).replace("@BODY@", "\n".join(body))


def _spans(tokens: tuple[Token, ...]) -> str:
    return "".join(
        f'<span class="{"t" if token.trained else "n"}{i % 2} {token.role}" title="{token.role}, id {" ".join(map(str, token.ids))}">'
        f"{html_text.escape(token.text)}</span>"
        for i, token in enumerate(tokens)
    )


def _escaped(text: str) -> str:
    return html_text.escape(visible(text))


def _seen(char: str) -> str:
    if char == "\n":
        return "↵\n"
    if char == "\t":
        return "⇥"
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Preview of @NAME@</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; background: #fafafa; padding: 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .5rem }
.t0 { background: #8fd19e } .t1 { background: #b7e4c1 } .n0 { color: #666 } .n1 { color: #8a8a8a }
.system { border-bottom: 2px dotted #a678de } .user { border-bottom: 2px dotted #4a90d9 } .tool { border-bottom: 2px dotted #d98c4a }
.rejected { color: #b00020 }
</style></head><body>
<h1>Preview of @NAME@</h1>
<p><span class="t0">trained</span> <span class="n0">not trained</span>; underlined: <span class="system">system</span>,
<span class="user">user</span>, <span class="tool">tool</span>. Shades alternate from token to token; hover for role and id.</p>
@BODY@
</body></html>
"""


def main(argv: list[str]) -> int:
    """`ftcore preview RECIPE [PATH=VALUE ...]`"""
    parser = argparse.ArgumentParser(prog="ftcore preview", description="Shows rows token by token, coloured by trained or not.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, like pipelines/recipes/sft-lora.yaml")
    parser.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="a key set over the file's, like data.train_on=last")
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows of each source (3)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page")
    options = parser.parse_args(argv)
    preview(load_recipe(options.recipe, options.overrides), options.rows, options.html)
    if options.html:
        print(f"written: {options.html}")
    return 0
