"""Tasks: the three pieces of work preparing data is cut into, each of bounded size and safe to repeat: encode, find copies, pack.

In: small JSON-able orders; rows and parts from storage. Out: parts and shards on storage, small JSON-able answers.
Runs in: Ray Data tasks, or one after the other in the driver; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import numpy as np

from ftcore.data.audit import Audit
from ftcore.data.chat import Chat
from ftcore.data.duplicates import content_hash, exact_pairs, item_text, near_pairs, slice_of
from ftcore.data.encode import TOO_LONG, OverlongRefused, encode_item
from ftcore.data.formats.base import FORMATS, recognise, to_item
from ftcore.data.identity import model_type
from ftcore.data.pack import plan_blocks
from ftcore.data.prepared import write_shard
from ftcore.data.read import Piece, num_passes, read
from ftcore.data.redact import redact_item
from ftcore.data.split import SPLITS, asked
from ftcore.data.staging import Part, PartWriter, StagedPart
from ftcore.data.tokenizer import load_tokenizer, tokenizer_digest
from ftcore.data.types import Block, Rejected, Row
from ftcore.errors import ConfigError, DataError
from ftcore.recipe import Recipe, Source, parse_recipe
from ftcore.storage import Folder

HEAD_ROWS = 32
"""Rows a format is recognised by, at the beginning of each piece."""
PARTS = "parts.json"

Order = dict[str, Any]
Answer = dict[str, Any]


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
        return {
            "tokenizer_digest": tokenizer_digest(self.tokenizer), "template_digest": self.chat.template_digest, "chat": self.chat.describe(),
        }  # fmt: skip

    def _encode_piece(self, piece: Piece, writer: PartWriter, audit: Audit) -> None:
        source = self.recipe.data.sources[piece.source]
        rows = read(piece)
        head = list(islice(rows, HEAD_ROWS))
        name = self._format(source, head, audit)
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

    def _format(self, source: Source, head: list[Row | Rejected], audit: Audit) -> str:
        rows = [row for row in head if isinstance(row, Row)]
        wanted = self.recipe.stage.item
        if source.format != "auto":
            if FORMATS[source.format].item is not wanted:
                fitting = " | ".join(name for name, entry in FORMATS.items() if entry.item is wanted)
                got = f"{source.format} makes a {FORMATS[source.format].item.__name__}"
                raise ConfigError(f"stage `{self.recipe.stage.kind}` cannot learn from this format", where=source.path, got=got, wanted=fitting)
            return source.format
        if not rows:
            return "auto"  # nothing here gets as far as a format
        name, reason = recognise(rows, wanted)
        audit.note(f"{source.path}: format {name}, because {reason}")
        return name


def find_copies(staged: Folder, order: Order) -> Answer:
    """Pairs of copies in one range of keys: of content hashes, or of one band's (`band` >= 0). Written to `pairs-<number>`."""
    parts, starts = staged_parts(staged)
    band, threshold = order["band"], order["threshold"]
    found, rows = [], []
    for part, start in zip(parts, starts, strict=True):
        keys = slice_of(part.keys() if band < 0 else part.band(band, threshold), order["low"], order["high"])
        found.append(keys)
        rows.append(start + keys["item"].astype(np.int64))
    keys, numbers = np.concatenate(found), np.concatenate(rows)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in found])
    if band < 0:
        pairs = exact_pairs(keys, numbers)
    else:
        shared = _shared(keys["key"])
        keys, numbers, owners = keys[shared], numbers[shared], owners[shared]
        hashes = np.concatenate([parts[owner].items()["hash"][keys["item"][owners == owner]] for owner in np.unique(owners)] or [np.zeros(0, np.uint64)])
        sketches = [parts[owner].sketches()[keys["item"][owners == owner]] for owner in np.unique(owners)]
        pairs = near_pairs(keys, numbers, hashes, np.concatenate(sketches), threshold) if len(keys) else exact_pairs(keys, numbers)
    name = f"pairs-{order['number']:05d}"
    staged.write(name, pairs.tobytes())
    return {"pairs": name}


def _shared(keys: np.ndarray) -> np.ndarray:
    """Where a key occurs more than once."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)


def pack_window(recipe: Recipe, staged: Folder, blocks: Folder, order: Order) -> Answer:
    """Packs the examples of some segments and writes them as one shard."""
    data = recipe.data
    parts, _ = staged_parts(staged)
    members = [_chosen(parts[part], order["split"], reading) for part, reading in order["segments"]]
    lengths = np.concatenate([lengths for _, lengths, _ in members])
    block_tokens = data.block_tokens or data.max_length
    if packs(recipe):
        plan: Iterable[list[int]] = plan_blocks(lengths, block_tokens)
    else:
        plan = _by_item(np.concatenate([rows + (index << 40) for index, (_, _, rows) in enumerate(members)]))
        block_tokens = int(lengths.max())
    made = _blocks(plan, [parts[part] for part, _ in order["segments"]], members)
    shard, tokens = write_shard(blocks, order["key"], made, block_tokens)
    return {"shard": asdict(shard), "tokens": tokens.tolist(), "split": SPLITS[order["split"]]}


def packs(recipe: Recipe) -> bool:
    return recipe.data.pack and recipe.stage.packs


def staged_parts(staged: Folder) -> tuple[list[StagedPart], list[int]]:
    """Every part in order, and the index of its first item among all."""
    facts = staged.read_json(PARTS)
    parts = [StagedPart(staged, Part(**{**fact, "files": tuple(fact["files"])})) for fact in facts]
    ends = np.cumsum([part.part.items for part in parts]).tolist()
    return parts, [0, *ends[:-1]]


Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of the examples of one segment: where each starts in its part's ids, its length, its item's row."""


def _chosen(part: StagedPart, split: int, reading: int) -> Chosen:
    items, verdicts, lengths = part.items(), part.verdicts(), part.lengths()
    kept = np.repeat((verdicts["split"] == split) & (verdicts["copies"] > reading), items["examples"])
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return starts[kept], lengths[kept], np.repeat(verdicts["row"], items["examples"])[kept]


def _by_item(rows: np.ndarray) -> list[list[int]]:
    """The examples of each item, where nothing is packed."""
    edges = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    return [list(range(first, after)) for first, after in zip(edges.tolist(), [*edges[1:].tolist(), len(rows)], strict=True)]


def _blocks(plan: Iterable[list[int]], parts: list[StagedPart], members: list[Chosen]) -> Iterator[Block]:
    ids, masks = [part.ids() for part in parts], [part.mask() for part in parts]
    owners = np.repeat(np.arange(len(members)), [len(rows) for _, _, rows in members])
    starts, lengths, rows = (np.concatenate([member[at] for member in members]) for at in range(3))
    for chosen in plan:
        spans = [(int(owners[i]), int(starts[i]), int(starts[i] + lengths[i])) for i in chosen]
        yield Block(
            ids=np.concatenate([ids[owner][start:end] for owner, start, end in spans]),
            mask=np.concatenate([masks[owner][start:end] for owner, start, end in spans]),
            lengths=lengths[chosen].astype(np.int32), rows=rows[chosen].astype(np.int64),
        )  # fmt: skip
