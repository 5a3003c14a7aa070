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
    """Refusals and repeats do not change when a message was first accepted."""
    made = ledger(attempt("a", 1, 2, 503), attempt("a", 3, 4), attempt("a", 5, 6), attempt("b", 7, None))
    assert {message: one.answered_at for message, one in made.accepted().items()} == {"a": 4}
    assert len(made.of("a")) == 3


def test_what_was_answered_before_another_was_sent_runs_first() -> None:
    """a was answered before b was sent: b may not run before it."""
    made = ledger(attempt("a", 1, 2), attempt("b", 3, 4), attempt("c", 5, 6))
    assert made.overtaken(["a", "b", "c"]) == []
    assert made.overtaken(["b", "a", "c"]) == [("b", "a")]
    assert made.overtaken(["c", "b", "a"]) == [("c", "a"), ("b", "a")]


def test_what_overlapped_may_run_either_way() -> None:
    """b was sent while a was under way, in another feed: no order was promised."""
    made = ledger(attempt("a", 1, 4), attempt("b", 2, 3))
    assert made.overtaken(["a", "b"]) == made.overtaken(["b", "a"]) == []


def test_a_retry_is_as_old_as_its_first_sending() -> None:
    """b was first sent before a was answered, though accepted long after: either may run first."""
    made = ledger(attempt("b", 1, 2, 503), attempt("a", 1, 3), attempt("b", 4, 5))
    assert made.overtaken(["b", "a"]) == []


def test_strangers_are_left_out() -> None:
    """Messages of other senders say nothing."""
    assert ledger(attempt("a", 1, 2)).overtaken(["x", "a", "y"]) == []


def test_the_dump_is_one_object_a_line(tmp_path: Path) -> None:
    """Other tools can read it."""
    file = tmp_path / "ledger.jsonl"
    ledger(attempt("a", 1, 2), attempt("b", 3, None)).dump(file)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["message"], first["status"], second["answered_at"]) == ("a", 200, None)
