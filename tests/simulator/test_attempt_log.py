"""The attempt log: first acceptance, order, and its dump."""

from __future__ import annotations

import json
from pathlib import Path

from receiver.simulator.attempt_log import Attempt, AttemptLog


def attempt(message: str, sent_at: float, answered_at: float | None, status: int | None = 200) -> Attempt:
    return Attempt(
        feed="feed",
        message=message,
        number=1,
        kind="Device.New",
        attempt_id=None,
        sha256="",
        size=1,
        sent_at=sent_at,
        answered_at=answered_at,
        status=None if answered_at is None else status,
        error=None,
    )


def ledger(*attempts: Attempt) -> AttemptLog:
    made = AttemptLog()
    for one in attempts:
        made.record(one)
    return made


def test_the_first_acceptance_counts() -> None:
    """Rejections and repeats do not change when a message was first accepted."""
    made = ledger(attempt("a", 1, 2, 503), attempt("a", 3, 4), attempt("a", 5, 6), attempt("b", 7, None))
    assert {message: one.answered_at for message, one in made.accepted().items()} == {"a": 4}
    assert len(made.of("a")) == 3


def test_answered_before_sent() -> None:
    """a was answered before b was sent: a must run first."""
    made = ledger(attempt("a", 1, 2), attempt("b", 3, 4), attempt("c", 5, 6))
    assert made.overtaken(["a", "b", "c"]) == []
    assert made.overtaken(["b", "a", "c"]) == [("b", "a")]
    assert made.overtaken(["c", "b", "a"]) == [("c", "a"), ("b", "a")]


def test_overlapping_messages() -> None:
    """b was sent while a was in progress, in another feed: they have no order."""
    made = ledger(attempt("a", 1, 4), attempt("b", 2, 3))
    assert made.overtaken(["a", "b"]) == made.overtaken(["b", "a"]) == []


def test_a_retry_counts_from_its_first_attempt() -> None:
    """b was first sent before a was answered, though accepted later: they have no order."""
    made = ledger(attempt("b", 1, 2, 503), attempt("a", 1, 3), attempt("b", 4, 5))
    assert made.overtaken(["b", "a"]) == []


def test_unknown_messages_are_ignored() -> None:
    """Messages that are not in the log are ignored."""
    assert ledger(attempt("a", 1, 2)).overtaken(["x", "a", "y"]) == []


def test_dump(tmp_path: Path) -> None:
    """The dump has one JSON object in each line."""
    file = tmp_path / "ledger.jsonl"
    ledger(attempt("a", 1, 2), attempt("b", 3, None)).dump(file)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["message"], first["status"], second["answered_at"]) == ("a", 200, None)
