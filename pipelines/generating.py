"""Generating: the work of `ftcore generate`: rows to answers, window by window, over Ray Data's actors.

In: what is wanted. Out: `rows/part-<piece>-<window>.parquet` with the row's place, prompt, answer, tokens and the version that answered, or
the reason why there is no answer; sealed at the end. Runs in: the driver (orders and counts), Ray Data actors (an engine each).

A window that lies there is not made again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import ray.data

from cluster.connect import connect
from ftcore.data.formats.base import recognise, to_item
from ftcore.data.formats.messages import message
from ftcore.data.read import plan, read
from ftcore.data.records import Piece
from ftcore.data.types import Conversation, Message, Rejected, Row
from ftcore.engines.base import Sampling
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, DataError
from ftcore.parts import claim, read_table, write_table
from ftcore.recipe import Source
from ftcore.speaker import Speaker, Voice
from ftcore.storage import Folder, digest_of, is_sealed, seal
from pipelines.errands import environment

WINDOW = 256
"""Rows of one Parquet file, and what a stopped worker makes again at most."""
JOB = "generate.json"
SCHEMA = pa.schema(
    [
        ("row", pa.string()), ("messages", pa.string()), ("answer", pa.string()), ("finish", pa.string()), ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()), ("adapter", pa.string()), ("error", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A whole job, in plain values."""

    voice: Voice
    rows: tuple[str, ...]
    out: str
    engine: Torch
    sampling: Sampling
    max_tokens: int

    @classmethod
    def of(
        cls, ref: str, base: str, store: str, rows: Sequence[str], out: str, engine: Torch, sampling: Sampling, max_tokens: int
    ) -> Wanted:  # fmt: skip
        if max_tokens < 1:
            raise ConfigError("an answer has at least one token", where="--max-tokens", got=str(max_tokens), wanted="1 or more")
        return cls(Voice.find(ref, store, base), tuple(rows), out, engine, sampling, max_tokens)

    def facts(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What makes two jobs the same one."""
        return {
            "adapter": self.voice.ref.full if self.voice.ref else "", "base": self.voice.base, "revision": self.voice.revision,
            "sampling": asdict(self.sampling), "max_tokens": self.max_tokens, "context": self.engine.max_context, "window": WINDOW,
            "dtype": self.engine.dtype, "quantise": self.engine.quantise,
            "pieces": digest_of([asdict(piece) for piece in pieces]),
        }  # fmt: skip


def generate(wanted: Wanted, *, workers: int = 1, gpus: float = 0) -> int:
    """Answers every row. Raises ConfigError when the folder holds another job's answers."""
    pieces = plan([Source(path=path) for path in wanted.rows])
    out, facts = Folder(wanted.out), wanted.facts(pieces)
    claim(out, JOB, facts, "this folder holds the answers of another job")
    if is_sealed(out):
        print(f"made before: {out}")
        return 0
    connection = connect(log=print)
    started = time.monotonic()
    counts = Counter[str]()
    orders = [{"number": number, "piece": json.dumps(asdict(piece))} for number, piece in enumerate(pieces)]
    options: dict[str, Any] = {"num_cpus": 0 if gpus else 1, "num_gpus": gpus, "concurrency": max(1, min(workers, len(orders)))}
    options |= environment(connection)
    worker: Any = _Worker
    rows = ray.data.from_items(orders, override_num_blocks=len(orders))
    answers = rows.flat_map(worker, fn_constructor_args=(wanted,), **options)
    for record in answers.iter_rows():
        counts.update({key: record[key] for key in ("rows", "failed", "tokens", "found")})
        print(f"\r{counts['rows']:,} rows, {counts['tokens']:,} tokens", end="", flush=True)
    seal(out, {"rows": counts["rows"], "failed": counts["failed"], **facts})
    seconds = time.monotonic() - started
    done = f"{counts['rows']:,} rows in {seconds:.0f} s ({counts['found']:,} were there), {counts['failed']:,} without answer"
    print(f"\n{wanted.voice}: {done}")
    print(f"{out}/rows: read it with pandas.read_parquet or ray.data.read_parquet; column `error` says why a row has no answer")
    return 0


class _Worker:
    """An engine, and the windows it answers."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.out = wanted, Folder(wanted.out)
        self.runner = asyncio.Runner()
        self.speaker = self.runner.run(Speaker.open(wanted.voice, wanted.engine))

    def __call__(self, order: dict[str, Any]) -> Iterator[dict[str, int]]:
        rows = read(Piece(**json.loads(order["piece"])))
        for number, window in enumerate(_windows(rows)):
            key = f"rows/part-{order['number']:05d}-{number:05d}.parquet"
            found = self.out.exists(key)
            table = read_table(self.out, key) if found else self._answered(window, key)
            failed = len(table) - table["error"].null_count
            tokens = sum(filter(None, table["completion_tokens"].to_pylist()))
            yield {"rows": len(table), "failed": failed, "tokens": tokens, "found": len(table) if found else 0}

    def _answered(self, window: Sequence[Row | Rejected], key: str) -> pa.Table:
        records = self.runner.run(self._answer_all(window))
        table = pa.Table.from_pylist(records, SCHEMA)
        write_table(self.out, key, table)
        return table

    async def _answer_all(self, window: Sequence[Row | Rejected]) -> list[dict[str, Any]]:
        turns_of = _reader([row for row in window if isinstance(row, Row)])
        return await asyncio.gather(*(self._answer(row, turns_of) for row in window))

    async def _answer(self, row: Row | Rejected, turns_of: Any) -> dict[str, Any]:
        record: dict[str, Any] = {"row": str(row.origin), "adapter": self.wanted.voice.ref.full if self.wanted.voice.ref else ""}
        if isinstance(row, Rejected):
            return {**record, "error": f"{row.reason}: {row.detail}"}
        try:
            turns = turns_of(row)
            record["messages"] = json.dumps([{"role": turn.role, "content": turn.content} for turn in turns], ensure_ascii=False)
            answer = await self.speaker.answer(turns, self.wanted.max_tokens, self.wanted.sampling)
        except (DataError, ConfigError) as error:  # this row's own fault: the others go on
            return {**record, "error": str(error)}
        return {
            **record, "answer": answer.text, "finish": answer.finish, "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }  # fmt: skip


def _windows(rows: Iterable[Row | Rejected]) -> Iterator[list[Row | Rejected]]:
    left = iter(rows)
    while window := list(islice(left, WINDOW)):
        yield window


def _reader(rows: Sequence[Row]) -> Any:
    """How rows like these become the turns that want an answer."""
    name: str | None = None

    def turns(row: Row) -> tuple[Message, ...]:
        nonlocal name
        value = row.value
        if isinstance(value.get("messages"), list):
            found = [message(turn) for turn in value["messages"]]
        elif isinstance(value.get("prompt"), str):
            found = [Message("user", value["prompt"])]
        else:
            name = name or recognise(rows, Conversation)[0]
            item = to_item(row, name)
            assert isinstance(item, Conversation)
            found = list(item.messages)
        while found and found[-1].role == "assistant":
            found.pop()
        if not found:
            raise DataError("there is nothing to answer", where=row.origin, wanted="a last turn that is not the assistant's")
        return tuple(found)

    return turns
