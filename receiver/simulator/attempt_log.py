"""The sender's ledger: every attempt that was made, and what may be concluded from it afterwards.

The receiver is judged by it: what was answered 200 must be there, and what was answered before something else was sent
must have run before it. May not ask the receiver anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One sending of one message. Times are monotonic seconds of this process.

    `message` names what was sent: `Meta.Logs[].ID`, else "sha256:" and the digest of its first body. `number` counts
    the sendings of that message from 1. `answered_at` is None when no answer came.
    """

    feed: str
    message: str
    number: int
    kind: str | None
    attempt_id: str | None
    sha256: str
    size: int
    sent_at: float
    answered_at: float | None
    status: int | None
    error: str | None

    @property
    def accepted(self) -> bool:
        return self.status is not None and self.status < 400


class AttemptLog:
    """Attempts in the order in which they ended. Feeds in several threads may share one."""

    def __init__(self) -> None:
        self._attempts: list[Attempt] = []
        self._lock = Lock()

    def record(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts.append(attempt)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        with self._lock:
            return tuple(self._attempts)

    def of(self, message: str) -> tuple[Attempt, ...]:
        """Every attempt of that message."""
        return tuple(attempt for attempt in self.attempts if attempt.message == message)

    def accepted(self) -> dict[str, Attempt]:
        """By message, the attempt that was accepted first, in the order of their answers."""
        first: dict[str, Attempt] = {}
        for attempt in self.attempts:
            if attempt.accepted:
                first.setdefault(attempt.message, attempt)
        return first

    def overtaken(self, ran: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs (ran too early, ran too late) in the order in which messages ran.

        Promised is: what was answered before another was first sent runs first. What overlapped may run either way.
        Messages that this ledger does not know are left out.
        """
        answered = {message: attempt.answered_at for message, attempt in self.accepted().items()}
        sent: dict[str, float] = {}
        for attempt in self.attempts:
            sent[attempt.message] = min(attempt.sent_at, sent.get(attempt.message, math.inf))
        pairs = []
        earliest, culprit = math.inf, ""
        for message in reversed(ran):
            if message not in sent:
                continue
            if earliest < sent[message]:
                pairs.append((message, culprit))
            if (time := answered.get(message)) is not None and time < earliest:
                earliest, culprit = time, message
        return pairs[::-1]

    def lines(self) -> Iterable[str]:
        """One JSON object an attempt. No body is in it."""
        return (json.dumps(asdict(attempt)) for attempt in self.attempts)

    def dump(self, path: Path) -> None:
        """Write `lines` to a file."""
        path.write_text("".join(f"{line}\n" for line in self.lines()), encoding="utf-8")
