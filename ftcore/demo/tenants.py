"""Tenants: the demo's two teams, their logs and rows on disk.

    python -m ftcore.demo.tenants rows.jsonl          a day of the first team's, to try a cluster on (pipelines/recipes/demo-lora.yaml)

In: a seed. Out: event logs and `messages` rows, training and held-out. Runs in: the driver.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftcore.data.formats.messages import messages
from ftcore.data.types import Conversation, Origin, Row
from ftcore.demo.personas import Team, draw_team, drifted
from ftcore.demo.rows import conversation, read_log, write_log, write_rows
from ftcore.demo.simulator import Session, sessions


@dataclass(frozen=True)
class TenantDay:
    """One team's sessions of one period: `log` and `rows` on disk to train on; sessions never written there to judge by."""

    team: Team
    log: Path
    rows: Path
    held_out: tuple[Session, ...]

    def train(self) -> list[Conversation]:
        return [to_conversation(conversation(events), self.rows, number) for number, events in enumerate(read_log(self.log), 1)]

    def test(self) -> list[Conversation]:
        return [conversation_of(session) for session in self.held_out]


def demo_teams(seed: int) -> tuple[Team, Team]:
    """Two teams that nobody in the base's population is; to every situation the second answers otherwise than the first."""
    rng = np.random.default_rng([seed, 1])
    acme = draw_team(rng, "acme")
    return acme, draw_team(rng, "globex", avoid=acme)


def new_habits(team: Team, seed: int) -> Team:
    """The same team some time later."""
    return drifted(team, np.random.default_rng([seed, 2]))


def write_day(team: Team, folder: Path, *, day: str, num_train: int, num_test: int, seed: int) -> TenantDay:
    """Simulates the team, writes the collector's log and the rows made of it; the held-out sessions come from other seeds."""
    made = sessions(team, num_train, seed_of(seed, team.name, day, "train"), day=day)
    log = write_log(([event.to_json() for event in session.events] for session in made), folder / f"{team.name}-{day}.events.jsonl")
    rows = write_rows((conversation(events) for events in read_log(log)), folder / f"{team.name}-{day}.rows.jsonl")
    return TenantDay(team, log, rows, tuple(sessions(team, num_test, seed_of(seed, team.name, day, "test"), day=f"{day}-held-out")))


def seed_of(*names: object) -> int:
    """A seed of its own for everything that has a name."""
    return zlib.crc32("/".join(map(str, names)).encode())


def conversation_of(session: Session) -> Conversation:
    return to_conversation(conversation(event.to_json() for event in session.events), Path(session.events[0].session), 1)


def to_conversation(row: dict[str, object], file: Path, number: int) -> Conversation:
    item = messages(Row(row, Origin(str(file), number)))
    assert isinstance(item, Conversation)
    return item


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ftcore.demo.tenants", description="Writes rows to train on: how one team works.")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--sessions", type=int, default=150, help="a row each (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    team, _ = demo_teams(options.seed)
    made = sessions(team, options.sessions, seed_of(options.seed, team.name, "monday", "train"), day="monday")
    write_rows((conversation(event.to_json() for event in session.events) for session in made), options.file)
    print(f"{options.sessions} rows of {team.name}: {options.file}")


if __name__ == "__main__":
    main()
