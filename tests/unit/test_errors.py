"""Errors are one tree, read as messages, and survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from ftcore import errors
from ftcore.errors import ConfigError, DataError, FtcoreError, StorageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FtcoreError) and kind is not FtcoreError]


def test_a_message_says_what_where_got_wanted_and_remedy() -> None:
    error = DataError("a row is empty", where="rows.jsonl, row 7", got="''", wanted="text", remedy="remove the row")
    assert str(error) == "a row is empty\n  where:  rows.jsonl, row 7\n  got:    ''\n  wanted: text\n  remedy: remove the row"


def test_facts_that_are_unknown_are_left_out() -> None:
    assert str(ConfigError("no")) == "no"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_whole_out_of_another_process(kind: type[FtcoreError]) -> None:
    sent = kind("what", where="there", got="this", wanted="that", remedy="do so")
    received = pickle.loads(pickle.dumps(sent))
    assert (type(received), str(received)) == (kind, str(sent))


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_also_the_standard_one_it_stands_for(kind: type[FtcoreError]) -> None:
    assert issubclass(kind, ValueError | OSError | RuntimeError)


def test_exit_codes_tell_the_kinds_apart() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes) and all(1 < code < 126 for code in codes)


def test_a_storage_error_reads_like_the_others() -> None:
    assert str(StorageError("cannot write this", where="/full")).startswith("cannot write this\n  where:  /full")
