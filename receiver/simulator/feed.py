"""Feeds: deliver messages as Redox does. First in, first out; one at a time; a failure pauses all later messages.

Redox, delivery rules: at least once. Any status of 400 or more, or no response, pauses the whole queue, and the same
message is tried again with a new attempt id until it succeeds. A query is sent once, and its failure pauses nothing.
Must not skip a message.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Event
from time import monotonic
from typing import Final, Self
from uuid import uuid4

from receiver.protocol.message import QUERIES
from receiver.simulator.attempt_log import Attempt, AttemptLog
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.http_connection import HttpReply

# Seconds before each retry, as Redox documented them. After the last entry, every minute.
RETRY_AFTER: Final = (0, 10, 10, 20, 30, 50, 80, 120)
THEN_EVERY: Final = 60

_META: Final = re.compile(r'"Meta"\s*:\s*')
_ATTEMPT_ID: Final = re.compile(r'("AttemptID"\s*:\s*)(?:"[^"]*"|[0-9]+|null)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A message that was delivered, or that the feed gave up. `body`: the bytes of the last attempt."""

    message: str
    body: bytes = field(repr=False)
    answer: HttpReply
    attempts: int


class FeedSimulator:
    """The queue of one subscription, on one connection. Each thread needs its own.

    `time_scale`: 0.001 turns Redox's minutes into milliseconds. `attempts` and `deadline` (real seconds) limit the
    attempts of one message; Redox has no such limit. `ledger`: feeds may share one.
    """

    def __init__(
        self,
        redox: FakeRedox,
        *,
        name: str = "feed",
        time_scale: float = 1.0,
        attempts: int | None = None,
        deadline: float | None = None,
        ledger: AttemptLog | None = None,
    ) -> None:
        self.name = name
        self.ledger = AttemptLog() if ledger is None else ledger
        self._redox, self._connection = redox, redox.connect()
        self._time_scale, self._attempts, self._deadline = time_scale, attempts, deadline
        self._stopped = Event()
        self._attempt_counts: dict[str, int] = {}

    def run(self, bodies: Iterable[bytes]) -> bool:
        """Deliver every body in order. Returns False if the queue stops: a message reached its limits, or `stop` was
        called.
        """
        for body in bodies:
            sent = self.deliver(body)
            if self._stopped.is_set() or not (sent.answer.accepted or _envelope(body)[0] in QUERIES):
                return False
        return True

    def deliver(self, body: bytes, *, lose_answers: int = 0) -> Sent:
        """Send one message until it is accepted, a limit is reached, or the feed is stopped.

        The responses of its first `lose_answers` attempts are lost.
        """
        kind, log_id, _ = _envelope(body)
        message = log_id or f"sha256:{sha256(body).hexdigest()}"
        bound = 1 if kind in QUERIES else self._attempts
        ends = None if self._deadline is None else monotonic() + self._deadline
        pauses = itertools.chain(RETRY_AFTER, itertools.repeat(THEN_EVERY))
        attempt = 0
        while True:
            attempt += 1
            answer = self._redox.send(body, connection=self._connection, lose_answer=attempt <= lose_answers)
            self._record(message, kind, body, answer)
            wait = next(pauses) * self._time_scale
            late = ends is not None and monotonic() + wait > ends
            if answer.accepted or attempt == bound or late or self._stopped.wait(wait):
                return Sent(message=message, body=body, answer=answer, attempts=attempt)
            body = with_attempt(body, str(uuid4()))

    def duplicate(self, sent: Sent) -> Sent:
        """Deliver an accepted message again with a new attempt id, as an at-least-once sender may do."""
        return self.deliver(with_attempt(sent.body, str(uuid4())))

    def stop(self) -> None:
        """End the current pause, and make no more attempts. May be called from any thread."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, message: str, kind: str | None, body: bytes, answer: HttpReply) -> None:
        number = self._attempt_counts[message] = self._attempt_counts.get(message, 0) + 1
        self.ledger.record(
            Attempt(
                feed=self.name,
                message=message,
                number=number,
                kind=kind,
                attempt_id=_envelope(body)[2],
                sha256=sha256(body).hexdigest(),
                size=len(body),
                sent_at=answer.sent_at,
                status=answer.status,
                answered_at=None if answer.status is None else answer.sent_at + answer.seconds,
                error=answer.error,
            )
        )


def with_attempt(body: bytes, attempt_id: str) -> bytes:
    """Set that id in `Meta.Logs[].AttemptID`. Only Meta changes; a body without an id is not changed."""
    text = body.decode("utf-8", "surrogateescape")
    found = _META.search(text)
    if found is None:
        return body
    try:
        _, end = json.JSONDecoder().raw_decode(text, found.end())
    except ValueError:
        return body
    meta = _ATTEMPT_ID.sub(rf'\g<1>"{attempt_id}"', text[found.end() : end])
    return (text[: found.end()] + meta + text[end:]).encode("utf-8", "surrogateescape")


def _envelope(body: bytes) -> tuple[str | None, str | None, str | None]:
    """Return (kind, log id, attempt id), each if the body contains it: the body may be anything."""
    try:
        meta = json.loads(body)["Meta"]
        kind = f"{meta['DataModel']}.{meta['EventType']}".replace(" ", "")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None, None
    try:
        log = meta["Logs"][0]
        return kind, str(log["ID"]), str(log["AttemptID"])
    except (KeyError, TypeError, IndexError):
        return kind, None, None
