"""Attack cases: a receiver with the documented responses passes each, and one without fails."""

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
def test_correct_responses(each: AttackCase) -> None:
    """The receiver's own verification answers each attack with a correct status."""
    with model_receiver() as target:
        assert each.check(each.send(target, 1)) is None


def test_names_differ() -> None:
    """Each attack has its own name."""
    assert len({each.name for each in ALL}) == len(ALL)


def test_a_receiver_that_accepts_everything() -> None:
    """A receiver that answers 200 to everything fails every attack of an attacker or an unknown source."""
    with model_receiver(lambda _body, _count, _right: (200, TEXT, b"")) as target:
        for each in (each for each in ALL if each.name != "PUT"):
            wrong = each.check(each.send(target, 1))
            assert (wrong is None) == (200 in each.statuses), each.name


def test_a_challenge_in_a_401() -> None:
    """A 401 that contains the challenge is not a correct response."""
    with model_receiver(lambda body, _count, _right: (401, TEXT, body)) as target:
        handshake = next(each for each in ALL if each.name == "handshake, wrong token")
        assert handshake.check(handshake.send(target, 1)) == "responded with the challenge in the body, expected 401"


def test_unknown_sources_where_they_are_accepted() -> None:
    """A destination that accepts or quarantines unknown sources may answer 200."""
    with model_receiver(on_unknown_source="quarantine") as target:
        named = {each.name: each for each in attack_cases(unknown_source=200)}
        for name in ("unknown source", "no source named"):
            assert named[name].check(named[name].send(target, 1)) is None


def test_the_text_of_a_failure() -> None:
    """A failure names the actual and the correct status."""
    each = AttackCase(name="x", statuses=frozenset({401, 403}), send=lambda _target, _seed: answer(200))
    assert each.check(answer(401)) is None
    assert each.check(answer(200)) == "responded 200, expected 401 or 403"
    assert each.check(answer(None, "TimeoutError")) == "responded TimeoutError, expected 401 or 403"
