"""The back-off n-gram against counts made by hand."""

from __future__ import annotations

from ftcore.data.types import Conversation, Message, Origin
from ftcore.evals.ngram import BackoffNgram, answers, kind_of


def session(user: str, *turns: str) -> Conversation:
    """Turns alternate: seen, done, seen, done..."""
    roles = ("user", "assistant")
    said = tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns))
    return Conversation((Message("system", f"user {user}"), *said), Origin("test", 1))


def test_the_longest_known_context_decides() -> None:
    ngram = BackoffNgram(order=4).fit([session("ada", "login", "mail", "ok", "read"), session("ada", "usb", "copy", "ok", "eject")])
    assert ngram.predict("user ada", ("usb", "copy", "ok")) == "eject"
    assert ngram.predict("user ada", ("login", "mail", "ok")) == "read"


def test_the_most_frequent_answer_wins() -> None:
    ngram = BackoffNgram().fit([session("ada", "login", "mail"), session("ada", "login", "web"), session("ada", "login", "web")])
    assert ngram.predict("user ada", ("login",)) == "web"


def test_a_tie_is_broken_the_same_way_every_time() -> None:
    pair = [session("ada", "login", "web"), session("ada", "login", "mail")]
    assert (
        BackoffNgram().fit(pair).predict("user ada", ("login",)) == BackoffNgram().fit(pair[::-1]).predict("user ada", ("login",)) == "mail"
    )


def test_the_users_own_counts_come_before_everybodys() -> None:
    ngram = BackoffNgram().fit([session("ada", "login", "mail")] + [session("ben", "login", "web")] * 5)
    assert ngram.predict("user ada", ("login",)) == "mail"


def test_an_unknown_user_gets_everybodys_habits() -> None:
    ngram = BackoffNgram().fit([session("ada", "login", "mail"), session("ben", "login", "mail"), session("ben", "usb", "eject")])
    assert ngram.predict("user cleo", ("login",)) == "mail"


def test_an_unknown_turn_backs_off_to_its_first_word() -> None:
    ngram = BackoffNgram().fit([session("ada", "download a.txt", "scan"), session("ada", "usb", "eject"), session("ada", "usb", "eject")])
    assert ngram.predict("user ada", ("+ mutt 431, download b.txt",)) == "scan"


def test_nothing_known_falls_back_to_the_commonest_answer() -> None:
    ngram = BackoffNgram().fit([session("ada", "usb", "eject"), session("ada", "usb", "eject"), session("ada", "login", "mail")])
    assert ngram.predict("user ada", ("never seen",)) == "eject"


def test_an_empty_table_predicts_nothing() -> None:
    assert BackoffNgram().predict("user ada", ("login",)) == ""


def test_forecasts_follow_the_answers_in_order() -> None:
    ngram = BackoffNgram().fit([session("ada", "login", "mail", "usb", "eject")])
    [forecast] = ngram.forecast([session("ada", "login", "mail", "usb", "copy")])
    assert forecast.hits.tolist() == [True, False]


def test_turns_of_weight_zero_are_context_but_not_answers() -> None:
    said = (Message("user", "a"), Message("assistant", "b", weight=0), Message("user", "c"), Message("assistant", "d"))
    assert list(answers(Conversation(said, Origin("test", 1)))) == [(("a", "b", "c"), "d")]


def test_the_kind_of_an_observation_is_the_last_things_first_word() -> None:
    assert kind_of("+ mutt 431, download plan4.doc") == "download"
