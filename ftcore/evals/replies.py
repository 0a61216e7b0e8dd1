"""Replies: what a judge said, question by question, kept as it comes, so that a stopped judgement pays for nothing twice.

In: Replies. Out: Parquet parts in the judgement's folder, read back. Runs in: the driver.

    judgement.json                  what makes two judgements the same one: judge, rubric, answers
    asked.json                      how the judge tells its verdicts, found out by a trial
    replies/<key of the first>.parquet     REPLIES_A_PART each; the last part of a command may hold fewer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ftcore.evals.rubric import Form
from ftcore.evals.spending import Spent
from ftcore.parts import claim, read_table, write_table
from ftcore.storage import Folder, digest_of

REPLIES_A_PART = 16
"""What a command that is killed asks again at most."""
JUDGEMENT, ASKED, PARTS = "judgement.json", "asked.json", "replies"
_COUNTS = ("calls", "prompt_tokens", "completion_tokens", "uncounted")
SCHEMA = pa.schema(
    [*((name, pa.string()) for name in ("id", "turn", "verdict", "text", "error")), *((name, pa.int64()) for name in _COUNTS)]
)


@dataclass(frozen=True)
class Reply:
    """To the question of row `id`; `turn` tells its questions apart (who was shown first)."""

    id: str
    turn: str
    verdict: str
    """"" where none could be read, asked twice."""
    text: str
    error: str
    """Why the judge could not be asked this; "" where it could."""
    spent: Spent

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.turn


class Replies:
    """One judgement's folder."""

    def __init__(self, folder: Folder, facts: dict[str, Any]) -> None:
        self.folder = folder
        claim(folder, JUDGEMENT, facts, "this folder holds another judgement")

    def read(self) -> dict[tuple[str, str], Reply]:
        found: dict[tuple[str, str], Reply] = {}
        for name in sorted(self.folder.names(PARTS)):
            if name.endswith(".parquet"):
                found |= {reply.key: reply for reply in map(_reply, read_table(self.folder, f"{PARTS}/{name}").to_pylist())}
        return found

    def write(self, replies: Sequence[Reply]) -> None:
        """Under a name of its own: no part is written over."""
        records = [{**{key: value for key, value in asdict(reply).items() if key != "spent"}, **asdict(reply.spent)} for reply in replies]
        name = digest_of([list(reply.key) for reply in replies])[:16]
        write_table(self.folder, f"{PARTS}/{name}.parquet", pa.Table.from_pylist(records, SCHEMA))

    def form(self) -> tuple[Form | None, Spent]:
        """How the judge is asked, and what it cost to find out; None where nobody tried yet."""
        if not self.folder.exists(ASKED):
            return None, Spent()
        found = self.folder.read_json(ASKED)
        return found["form"], Spent(**found["spent"])

    def write_form(self, form: Form, spent: Spent) -> None:
        self.folder.create(ASKED, json.dumps({"form": form, "spent": asdict(spent)}).encode())


def _reply(record: dict[str, Any]) -> Reply:
    counts = Spent(**{name: record.pop(name) for name in _COUNTS})
    return Reply(**record, spent=counts)
