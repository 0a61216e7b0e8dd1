"""The simulator: seeded, exact about its own odds, and a demo whose tenants contradict each other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ftcore.demo.ceiling import Ceiling
from ftcore.demo.personas import SITUATIONS, draw_habit, draw_team, drifted
from ftcore.demo.rows import conversation, read_log, write_log
from ftcore.demo.shell import history_commands, shell_session
from ftcore.demo.simulator import ceiling, next_operations, sessions, simulate
from ftcore.demo.tenants import conversation_of, demo_teams, new_habits, write_day
from ftcore.evals.ngram import BackoffNgram


def as_json(made) -> str:
    return json.dumps([[event.to_json() for event in session.events] for session in made])


def test_the_same_seed_gives_the_same_sessions() -> None:
    team, again = demo_teams(3)[0], demo_teams(3)[0]
    assert as_json(sessions(team, 4, 5)) == as_json(sessions(again, 4, 5))


def test_another_seed_gives_other_sessions() -> None:
    team = demo_teams(3)[0]
    assert as_json(sessions(team, 4, 5)) != as_json(sessions(team, 4, 6))


def test_any_session_can_be_made_again_alone() -> None:
    team = demo_teams(0)[0]
    third = list(sessions(team, 4, 9))[2]
    assert simulate(team.personas[0], np.random.default_rng([9, 2]), third.events[0].session) == third


def test_demo_tenants_answer_every_situation_differently() -> None:
    for seed in range(3):
        acme, globex = demo_teams(seed)
        same = [
            s.name for s in SITUATIONS for a in acme.personas for b in globex.personas[:1] if a.favourite(s.name) == b.favourite(s.name)
        ]
        shared = [s.name for s in SITUATIONS if acme.personas[0].favourite(s.name) == globex.personas[0].favourite(s.name)]
        assert len(same) <= 0.3 * 2 * len(SITUATIONS), same
        assert len(shared) <= 0.3 * len(SITUATIONS), shared


def test_a_teams_users_share_most_habits_but_not_all() -> None:
    first, second = demo_teams(0)[0].personas
    share = np.mean([first.habits[s.name] == second.habits[s.name] for s in SITUATIONS])
    assert 0.4 <= share < 1


def test_drift_changes_its_share_of_favourites() -> None:
    before = demo_teams(1)[0]
    after = new_habits(before, 1)
    changed = np.mean([before.personas[0].favourite(s.name) != after.personas[0].favourite(s.name) for s in SITUATIONS])
    assert 0.2 <= changed <= 0.5
    assert after.personas[0].slots["archive"] != before.personas[0].slots["archive"]
    assert after.personas[0].user == before.personas[0].user


def test_drift_by_nothing_changes_no_habit() -> None:
    team = demo_teams(1)[0]
    assert drifted(team, np.random.default_rng(0), share=0).personas[0].habits == team.personas[0].habits


def test_a_habit_is_a_distribution_with_a_strong_favourite() -> None:
    habit = draw_habit(np.random.default_rng(4), 6, avoid=2)
    assert math.isclose(sum(habit), 1)
    assert 0.75 <= max(habit) <= 0.97
    assert int(np.argmax(habit)) != 2


def test_the_next_operation_is_foretold_from_the_routines_that_began_so() -> None:
    routines = [("a", "b"), ("a", "c"), ("a",), ("d",)]
    assert next_operations(routines, (0.3, 0.1, 0.2, 0.4), ()) == pytest.approx({"a": 0.6, "d": 0.4})
    assert next_operations(routines, (0.3, 0.1, 0.2, 0.4), ("a",)) == pytest.approx({"b": 0.75, "c": 0.25})


def test_routines_that_read_the_same_add_up() -> None:
    assert next_operations([("delete x",), ("delete x",), ("wait",)], (0.3, 0.3, 0.4), ()) == pytest.approx({"delete x": 0.6, "wait": 0.4})


def test_the_ceiling_is_what_the_likeliest_guess_hits() -> None:
    """Over many sessions the best predictor's hits agree with their expectation, and the odds with what happens."""
    made = list(sessions(demo_teams(0)[0], 300, 1))
    odds = [one for session in made for one in session.odds]
    hits = np.array([one.best == one.operation for one in odds])
    assert abs(hits.mean() - ceiling(made).exact_match) < 3 * hits.std() / math.sqrt(len(hits))
    assert all(0 < one.probability <= one.best_probability <= 1 + 1e-12 for one in odds)


def test_no_predictor_beats_the_ceiling() -> None:
    """An n-gram that has seen the very sessions it is judged by is beaten on fresh ones by the predictor that knows the persona."""
    team = demo_teams(0)[0]
    train, test = list(sessions(team, 150, 1)), list(sessions(team, 60, 2))
    fresh = [conversation_of(session) for session in test]
    ngram = BackoffNgram().fit([conversation_of(session) for session in train])
    hit = sum(f.hits.sum() for f in ngram.forecast(fresh))
    best = sum(f.hits.sum() for f in Ceiling(test).forecast(fresh))
    assert hit < best


def test_operations_copy_names_from_earlier_in_the_session() -> None:
    """At least half of the operations name something that the session itself brought up, so whole-operation counts cannot foretell them."""
    copied = total = 0
    for session in sessions(demo_teams(0)[0], 40, 7):
        for message in (messages := conversation(event.to_json() for event in session.events)["messages"]):
            if message["role"] == "assistant":
                before = " ".join(m["content"] for m in messages[: messages.index(message)]).split()
                names = [w for w in message["content"].split() if "." in w or w.isdigit()]
                copied += any(name in before for name in names)
                total += 1
    assert copied / total > 0.4


def test_the_log_reads_like_a_collectors(tmp_path: Path) -> None:
    team = demo_teams(0)[0]
    path = write_log(([e.to_json() for e in s.events] for s in sessions(team, 3, 1)), tmp_path / "log.jsonl")
    logs = list(read_log(path))
    assert len(logs) == 3
    starts = [event for log in logs for event in log if event["kind"] == "process_start"]
    assert starts
    assert all({"time", "session", "user", "process", "pid", "parent", "ppid", "memory_mib"} <= event.keys() for event in starts)
    times = [event["time"] for event in logs[0]]
    assert times == sorted(times)


def test_a_process_is_not_stopped_before_it_started() -> None:
    for session in sessions(demo_teams(2)[0], 40, 3):
        running: set[int] = set()
        for event in session.events:
            if event.kind == "process_start":
                running.add(event.pid)
            elif event.kind == "process_stop":
                assert event.pid in running
                running.remove(event.pid)


def test_a_session_becomes_one_conversation_with_an_answer_for_every_operation() -> None:
    session = next(sessions(demo_teams(0)[0], 1, 1))
    messages = conversation(event.to_json() for event in session.events)["messages"]
    assert [m["role"] for m in messages[:3]] == ["system", "user", "assistant"]
    assert [m["content"] for m in messages if m["role"] == "assistant"] == [odds.operation for odds in session.odds]


def test_held_out_sessions_are_not_among_the_training_rows(tmp_path: Path) -> None:
    day = write_day(demo_teams(0)[0], tmp_path, day="monday", num_train=20, num_test=10, seed=0)
    words = [sys.executable, "-m", "ftcore.demo.tenants", str(tmp_path / "rows.jsonl"), "--sessions", "20"]
    subprocess.run(words, check=True, capture_output=True)
    assert (tmp_path / "rows.jsonl").read_bytes() == day.rows.read_bytes()
    assert len(day.train()) == 20
    rows = {tuple(m.content for m in c.messages) for c in day.train()}
    assert not rows & {tuple(m.content for m in c.messages) for c in day.test()}


def test_the_population_draws_no_demo_tenant() -> None:
    acme = demo_teams(0)[0].personas[0]
    for seed in range(200):
        persona = draw_team(np.random.default_rng([20_000, seed]), "population", users=1).personas[0]
        assert np.mean([persona.favourite(s.name) == acme.favourite(s.name) for s in SITUATIONS]) < 0.75


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("ls\n#1700000000\ncd  src\n\n", ["ls", "cd src"]),
        (": 1700000000:0;git status\n: 1700000001:2;make test\n", ["git status", "make test"]),
        ("- cmd: git push\n  when: 1700000000\n", ["git push"]),
    ],
)
def test_histories_of_three_shells_are_read(text: str, commands: list[str]) -> None:
    assert history_commands(text) == commands


def test_shell_sessions_are_seeded() -> None:
    assert shell_session(np.random.default_rng(1)) == shell_session(np.random.default_rng(1))
