"""Encode rows: the task that turns pieces of files into staged parts: read, recognise, redact, hash, encode, tally.

In: orders (JSON-able): a number and some pieces. Out: parts on storage; an answer with their facts and the audit of these rows.
Runs in: Ray Data actors (one tokenizer each), or the driver; no torch.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain

from ftcore.data.audit import Audit
from ftcore.data.chat import Chat
from ftcore.data.duplicates import content_hash, item_text
from ftcore.data.encode import TOO_LONG, OverlongRefused, encode_item
from ftcore.data.formats.base import to_item
from ftcore.data.identity import model_type
from ftcore.data.items import format_of, head_of
from ftcore.data.read import Piece, num_passes, read
from ftcore.data.redact import redact_item
from ftcore.data.split import asked
from ftcore.data.staging import PartWriter
from ftcore.data.tasks import Answer, Order
from ftcore.data.tokenizer import load_tokenizer, tokenizer_digest
from ftcore.data.types import Rejected, Row
from ftcore.errors import DataError
from ftcore.recipe import Recipe, Source, parse_recipe
from ftcore.storage import Folder


class EncodeRows:
    """Reads, checks, redacts, hashes and encodes the rows of some pieces into parts; opened once per process, for its tokenizer."""

    def __init__(self, recipe_text: str, plugins: tuple[str, ...], staged: str) -> None:
        self.recipe: Recipe = parse_recipe(recipe_text, plugins=plugins)
        self.staged = Folder(staged)
        model = self.recipe.model
        self.tokenizer = load_tokenizer(model)
        self.chat = Chat.open(self.tokenizer, data=self.recipe.data, template=model.chat_template, family=model_type(model))

    def __call__(self, order: Order) -> Answer:
        data = self.recipe.data
        audit = Audit()
        near = None if data.near_duplicates == "keep" else data.near_threshold
        writer = PartWriter(self.staged, f"{order['number']:05d}", near)
        for piece in (Piece(**fields) for fields in order["pieces"]):
            self._encode_piece(piece, writer, audit)
        writer.close()
        return {"audit": audit.to_json(), "parts": [asdict(part) for part in writer.parts]}

    def facts(self) -> dict[str, str]:
        """What the manifest says about the tokens: digests of the open tokenizer and template, and the template in words."""
        tokenizer, template = tokenizer_digest(self.tokenizer), self.chat.template_digest
        return {"tokenizer_digest": tokenizer, "template_digest": template, "chat": self.chat.describe()}

    def _encode_piece(self, piece: Piece, writer: PartWriter, audit: Audit) -> None:
        source = self.recipe.data.sources[piece.source]
        rows = read(piece)
        head = head_of(rows)
        name, why = format_of(source, head, self.recipe.stage.item)
        if why:
            audit.note(f"{source.path}: format {name}, because {why}")
        for row in chain(head, rows):
            audit.read += 1
            if isinstance(row, Rejected):
                audit.reject(row)
                continue
            try:
                self._encode_row(row, name, source, writer, audit)
            except OverlongRefused:
                raise
            except DataError as error:
                if error.what == TOO_LONG:
                    audit.drop(TOO_LONG, row.origin)  # asked for by `overlong: drop`
                else:
                    audit.reject(Rejected(row.origin, error.what, error.got))

    def _encode_row(self, row: Row, name: str, source: Source, writer: PartWriter, audit: Audit) -> None:
        data = self.recipe.data
        item = to_item(row, name)
        if data.redact != "off":
            item, kinds = redact_item(item, masked=data.redact == "mask")
            audit.redact(kinds, row.origin)
        content = content_hash(item)
        passes = num_passes(f"{content[0]:016x}{content[1]:016x}", source.weight)
        if not passes:
            audit.drop("left out by its source's weight", row.origin)
            return
        examples = encode_item(item, self.recipe.stage, self.chat, data)
        writer.add(content, asked(source), passes, examples, item_text(item) if writer.near_threshold is not None else "")
