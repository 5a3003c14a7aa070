"""Sends the requests of the outbox, one lane at a time: in order, at least once, with the same bytes in each attempt.

Must not claim a lane: the caller holds its lease, and nothing is written after the lease has ended. If a response is
lost, the request is sent again, because Redox may not have received it. The recipient can recognize a duplicate by its
content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.errors import IntegrityError, ReceiverError
from receiver.fault_injection.faults import point
from receiver.metrics import counters
from receiver.outbound.calls import Call
from receiver.outbound.errors import AuthenticationFailed, OutboundError, Rejected, Unsendable, Untrusted
from receiver.outbound.outbox.clients import Clients
from receiver.outbound.outbox.recording import Caller, OutboundRecorder, begun, ended, refused, sent
from receiver.retry_policy import pause
from receiver.states import OutboxState
from receiver.storage.queue import outbox
from receiver.storage.queue.leases import Lease
from receiver.storage.queue.outbox import MAX_UNANSWERED, QueuedRequest, RequestOutcome

log: Final = structlog.get_logger(__name__)

_begun, _posted, _ended = point("outbox.begun"), point("outbox.posted"), point("outbox.ended")


class LaneSender:
    """Sends requests for one worker. Safe in threads. One instance per process."""

    def __init__(self, engine: Engine, clients: Clients, recorder: OutboundRecorder, *, name: str) -> None:
        self._engine = engine
        self._clients = clients
        self._recorder = recorder
        self._name = name

    def run(self, lease: Lease, go_on: Callable[[], bool]) -> bool:
        """Send the requests of the lane while `go_on` is true. Returns True if there may be more to send now.

        Raises SQLAlchemyError; then the last request is sent again, unless its end is recorded.
        """
        while (queued := self._head(lease)) is not None:
            if not self._send_request(lease, queued):
                return False
            if not go_on():
                return True
        return False

    def _head(self, lease: Lease) -> QueuedRequest | None:
        with self._engine.connect() as connection:
            return outbox.head(connection, lease)

    def _send_request(self, lease: Lease, queued: QueuedRequest) -> bool:
        """Send one request. Returns True if the lane may continue."""
        if queued.lost and queued.unanswered + 1 >= MAX_UNANSWERED:
            return self._end(
                lease, queued, queued.attempts, RequestOutcome(state=OutboxState.DEAD, error_class="WorkerLost")
            )
        try:
            call = self._recorder.bodies.open_call(queued.request_key, queued.request, queued.uuid, queued.api_key)
        except IntegrityError as exc:
            return self._end(lease, queued, queued.attempts, refused(exc, queued.uuid, self._recorder.bodies))
        with self._recorder.transaction() as (connection, events):
            attempt = outbox.start(connection, lease, queued.id)
            if attempt is None:
                return False
            events.append(
                begun(call, _subject(queued), self._caller(queued), queued.api_key, attempt, self._recorder.digests)
            )
        _begun()
        end = self._send(call, queued, attempt)
        _posted()
        return self._end(lease, queued, attempt, end)

    def _send(self, call: Call, queued: QueuedRequest, attempt: int) -> RequestOutcome:
        try:
            answer = self._clients.client(queued.api_key).carry_out(call)
        except SQLAlchemyError:
            raise
        except Exception as exc:
            if not isinstance(exc, ReceiverError):
                log.exception("outbox.attempt_failed", uuid=str(queued.uuid))
            return next_action(
                exc,
                refused(exc, queued.uuid, self._recorder.bodies),
                attempt=attempt,
                unanswered=queued.unanswered + queued.lost,
            )
        return sent(answer, queued.uuid, self._recorder.bodies)

    def _end(self, lease: Lease, queued: QueuedRequest, attempt: int, end: RequestOutcome) -> bool:
        outcome = "failed" if end.state == OutboxState.PENDING else end.state
        with self._recorder.transaction() as (connection, events):
            if not outbox.end(connection, lease, queued.id, attempt, end):
                return False
            events.append(ended(queued.call, outcome, _subject(queued), self._caller(queued), end, attempt))
        _ended()
        # Which request ended how is in the log; here the key alone.
        counters.count_outbound(queued.api_key, str(outcome))
        write_log = {OutboxState.SENT: log.info, OutboxState.DEAD: log.error}.get(OutboxState(end.state), log.warning)
        write_log(
            f"outbox.{outcome}",
            uuid=str(queued.uuid),
            lane=lease.lane,
            attempt=attempt,
            status=end.status,
            error=end.error_class,
            pause=end.pause,
        )
        return end.state != OutboxState.PENDING

    def _caller(self, queued: QueuedRequest) -> Caller:
        return Caller(name=f"worker:{self._name}", destination=queued.destination, message_uuid=queued.message_uuid)


def next_action(exc: Exception, end: RequestOutcome, *, attempt: int, unanswered: int) -> RequestOutcome:
    """Decide what happens after a failed attempt: the request is dead, or is sent again after a pause.

    It is dead at once if Redox rejects it, and dead after MAX_UNANSWERED attempts that Redox may have processed. Other
    failures (no connection, too many requests, a rejected key or certificate) do not count.
    """
    if isinstance(exc, Rejected | Unsendable):
        return end
    ours = isinstance(exc, AuthenticationFailed | Untrusted) or (
        isinstance(exc, ReceiverError) and not isinstance(exc, OutboundError)
    )
    acted_on = not ours and not (isinstance(exc, OutboundError) and exc.not_processed)
    if acted_on and unanswered + 1 >= MAX_UNANSWERED:
        return replace(end, unanswered=True)
    asked = exc.retry_after if isinstance(exc, OutboundError) else None
    return replace(end, state=OutboxState.PENDING, unanswered=acted_on, pause=max(pause(attempt), asked or 0.0))


def _subject(queued: QueuedRequest) -> str:
    return f"outbound_requests:{queued.id}"
