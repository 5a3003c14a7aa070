"""Each trespass is what it says: a receiver that keeps the table of answers meets it, and one that does not is told."""

from __future__ import annotations

import pytest

from receiver.simulator.attacks import AttackCase, attack_cases
from receiver.simulator.http_connection import HttpReply
from tests.simulator.model_receiver import TEXT, model_receiver

ALL = attack_cases()


def answer(status: int | None, error: str | None = None) -> HttpReply:
    """An answer of that status."""
    return HttpReply(status=status, error=error, sent_at=0.0, seconds=0.0)


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_met_as_the_table_says(each: AttackCase) -> None:
    """The receiver's own judgement answers each trespass with the status that is right for it."""
    with model_receiver() as target:
        assert each.check(each.send(target, 1)) is None


def test_names_differ() -> None:
    """A name tells one trespass."""
    assert len({each.name for each in ALL}) == len(ALL)


def test_a_receiver_that_takes_everything() -> None:
    """Whoever answers everything 200 passes with none of those who are not Redox, or not known."""
    with model_receiver(lambda _body, _count, _right: (200, TEXT, b"")) as target:
        for each in (each for each in ALL if each.name != "PUT"):
            wrong = each.check(each.send(target, 1))
            assert (wrong is None) == (200 in each.statuses), each.name


def test_a_receiver_that_echoes_to_strangers() -> None:
    """A 401 that gives the challenge away is no refusal."""
    with model_receiver(lambda body, _count, _right: (401, TEXT, body)) as target:
        handshake = next(each for each in ALL if each.name == "handshake, wrong token")
        assert handshake.check(handshake.send(target, 1)) == "responded with the challenge in the body, expected 401"


def test_unknown_sources_where_they_are_let_in() -> None:
    """A destination that lets unknown sources in, or keeps what they send, is right to answer 200."""
    with model_receiver(on_unknown_source="quarantine") as target:
        named = {each.name: each for each in attack_cases(unknown_source=200)}
        for name in ("unknown source", "no source named"):
            assert named[name].check(named[name].send(target, 1)) is None


def test_what_is_told() -> None:
    """What is wrong is said with what came and what should have come."""
    each = AttackCase(name="x", statuses=frozenset({401, 403}), send=lambda _target, _seed: answer(200))
    assert each.check(answer(401)) is None
    assert each.check(answer(200)) == "responded 200, expected 401 or 403"
    assert each.check(answer(None, "TimeoutError")) == "responded TimeoutError, expected 401 or 403"
