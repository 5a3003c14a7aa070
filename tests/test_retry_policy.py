"""Facts about what becomes of a delivery, for each way in which a handler can end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from receiver.errors import GiveUp, RetryLater
from receiver.outbound.errors import RateLimited, RedoxUnavailable, Rejected
from receiver.retry_policy import LONGEST_DEFERRAL, Outcome, RetryDecision, RetryPolicy, decide, outcome_of, pause
from receiver.states import DeliveryState

POLICY = RetryPolicy(max_attempts=3, on_failure="dead")
HOLDING = RetryPolicy(max_attempts=3, on_failure="hold")
INLINE = RetryPolicy(max_attempts=3, on_failure="dead", inline=True)

FAILED = Outcome(kind="failed", error_class="ValueError")
LATER = Outcome(kind="retry_later", error_class="RetryLater", after=7.0)
GAVE_UP = Outcome(kind="gave_up", error_class="GiveUp:x")


def raised(exc: BaseException) -> Outcome:
    """The outcome of a handler that raised this."""
    try:
        raise exc
    except BaseException as caught:  # noqa: BLE001 - whatever it is
        return outcome_of(caught)


def test_an_error() -> None:
    """Of an error its class, its frames and its text are kept apart; the text is in no repr."""
    outcome = raised(ValueError("Zoltana Quibblewitz"))

    assert (outcome.kind, outcome.error_class, outcome.text) == ("failed", "ValueError", "Zoltana Quibblewitz")
    [frame] = outcome.frames
    assert frame.startswith("tests.test_retry_policy:")
    assert frame.endswith(":raised")
    assert "Zoltana" not in repr(outcome)


def test_a_class_that_was_made_up() -> None:
    """A class that was made while the program ran, whatever its name, is told by the base that stands in code; one
    that stands in a function keeps its name."""
    cls: Any = type("no bed for\nAnn " + "x" * 500, (Exception,), {})

    assert raised(cls()).error_class == "Exception"
    assert raised(type("Quibblewitz", (KeyError,), {})()).error_class == "KeyError"

    class BedMissing(LookupError):
        pass

    assert raised(BedMissing()).error_class == "BedMissing"


def test_a_text_that_cannot_be_made() -> None:
    """An error whose text raises an exception is still an outcome."""

    class Cursed(Exception):
        def __str__(self) -> str:
            raise KeyError("no")

    assert raised(Cursed()).text == "(its text is not available: KeyError)"


def test_a_long_way_down() -> None:
    """Of many frames the innermost fifty are kept."""

    def down(depth: int) -> None:
        if depth == 0:
            raise ValueError
        down(depth - 1)

    try:
        down(200)
    except ValueError as exc:
        frames = outcome_of(exc).frames
    assert len(frames) == 50
    assert {frame.rpartition(":")[2] for frame in frames} == {"down"}


@pytest.mark.parametrize(
    ("after", "kept"),
    [(60, 60.0), (0, 0.05), (-5, 0.05), (1e12, LONGEST_DEFERRAL), (math.inf, LONGEST_DEFERRAL), (math.nan, 0.05)],
)
def test_later(after: float, kept: float) -> None:
    """RetryLater says how long; nonsense is bounded."""
    assert (raised(RetryLater(after)).kind, raised(RetryLater(after)).after) == ("retry_later", kept)


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("no_such_ward", "GiveUp:no_such_ward"),
        ("Zoltana Quibblewitz", "GiveUp:unnamed"),
        ("", "GiveUp:unnamed"),
        ("x" * 65, "GiveUp:unnamed"),
    ],
)
def test_given_up(code: str, kept: str) -> None:
    """The code of GiveUp is shown when it is one word."""
    assert raised(GiveUp(code)).error_class == kept


def test_failed_attempts() -> None:
    """A failed attempt pauses its delivery; the last one makes it dead, or holds the lane."""
    for attempt in (1, 2):
        for policy in (POLICY, HOLDING):
            verdict = decide(FAILED, policy, attempt=attempt, deferred_for=0)
            assert (verdict.state, verdict.counted, verdict.hold) == ("pending", True, False)
            assert verdict.pause is not None
    for attempt in (3, 4):
        assert decide(FAILED, POLICY, attempt=attempt, deferred_for=0) == RetryDecision(state=DeliveryState.DEAD)
        assert decide(FAILED, HOLDING, attempt=attempt, deferred_for=0) == RetryDecision(
            state=DeliveryState.PENDING, hold=True
        )


def test_retry_later_and_give_up() -> None:
    """RetryLater counts nothing, for up to 72 hours; GiveUp needs no further attempt."""
    assert decide(LATER, POLICY, attempt=3, deferred_for=0) == RetryDecision(
        state=DeliveryState.PENDING, counted=False, deferred=True, pause=7.0
    )
    assert decide(LATER, POLICY, attempt=1, deferred_for=LONGEST_DEFERRAL).counted
    assert decide(LATER, POLICY, attempt=3, deferred_for=LONGEST_DEFERRAL).state == DeliveryState.DEAD
    assert decide(GAVE_UP, POLICY, attempt=1, deferred_for=0) == RetryDecision(state=DeliveryState.DEAD)
    assert decide(GAVE_UP, HOLDING, attempt=1, deferred_for=0) == RetryDecision(state=DeliveryState.PENDING, hold=True)


@pytest.mark.parametrize("outcome", [FAILED, LATER, GAVE_UP, Outcome(kind="timed_out", error_class="TimedOut")])
def test_within_a_request(outcome: Outcome) -> None:
    """What is run within a request never dies and never waits: Redox comes again."""
    verdict = decide(outcome, INLINE, attempt=99, deferred_for=0)

    assert (verdict.state, verdict.pause, verdict.hold) == ("pending", None, False)


def test_pauses_double() -> None:
    """The pause doubles from 2 seconds to 10 minutes, spread by a quarter, however many attempts there were."""
    for attempt, exact in ((1, 2), (2, 4), (5, 32), (9, 512), (10, 600), (10_000, 600)):
        pauses = [pause(attempt) for _ in range(200)]
        assert 0.75 * exact <= min(pauses) < max(pauses) <= 1.25 * exact


def test_an_outbound_error_that_may_pass() -> None:
    """An error of receiver.outbound that a handler lets through uses no attempt where the same call may succeed later,
    after the time that Redox asked for; any other is a failure."""
    outcome = raised(RedoxUnavailable(retry_after=7.0))
    assert (outcome.kind, outcome.error_class, outcome.after) == ("retry_later", "RedoxUnavailable", 7.0)
    assert raised(RateLimited()).after == 60.0
    assert raised(Rejected()).kind == "failed"
