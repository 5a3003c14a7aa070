"""The sender's attempt log: every attempt, and checks of the receiver against it.

A message that was answered with 200 must exist in the receiver. A message that was answered before another was sent
must run before it. Must not query the receiver.
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
    """One attempt to send one message. Times are monotonic seconds of this process.

    `message`: the id of the message: `Meta.Logs[].ID`, else "sha256:" and the digest of its first body. `number`:
    counts the attempts of that message from 1. `answered_at`: None if there was no response.
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
    """Attempts in the order in which they ended. Feeds in several threads may share one log."""

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
        """Return every attempt of that message."""
        return tuple(attempt for attempt in self.attempts if attempt.message == message)

    def accepted(self) -> dict[str, Attempt]:
        """Return the first accepted attempt of each message, in the order of the responses."""
        first: dict[str, Attempt] = {}
        for attempt in self.attempts:
            if attempt.accepted:
                first.setdefault(attempt.message, attempt)
        return first

    def overtaken(self, ran: Sequence[str]) -> list[tuple[str, str]]:
        """Return the pairs (ran too early, ran too late), given the order in which messages ran.

        A message that was answered before another was first sent must run first. Messages that overlap may run in
        either order. Messages that are not in this log are ignored.
        """
        answered = {message: attempt.answered_at for message, attempt in self.accepted().items()}
        sent: dict[str, float] = {}
        for attempt in self.attempts:
            sent[attempt.message] = min(attempt.sent_at, sent.get(attempt.message, math.inf))
        pairs = []
        earliest, overtaker = math.inf, ""
        for message in reversed(ran):
            if message not in sent:
                continue
            if earliest < sent[message]:
                pairs.append((message, overtaker))
            if (time := answered.get(message)) is not None and time < earliest:
                earliest, overtaker = time, message
        return pairs[::-1]

    def lines(self) -> Iterable[str]:
        """Yield one JSON object for each attempt, without the body."""
        return (json.dumps(asdict(attempt)) for attempt in self.attempts)

    def dump(self, path: Path) -> None:
        """Write `lines` to a file."""
        path.write_text("".join(f"{line}\n" for line in self.lines()), encoding="utf-8")
