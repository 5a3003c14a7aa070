"""Recorded calls: sent at once, with an audit entry before and after each, and sealed bodies.

Must not send a call that could not be recorded first: the audit shows everything that may have been sent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.errors import ReceiverError
from receiver.keyring import Keyring
from receiver.outbound.answers import Answer
from receiver.outbound.api import FilePart, RedoxApi
from receiver.outbound.calls import Call
from receiver.outbound.client import RedoxClient
from receiver.outbound.errors import OutboundError
from receiver.outbound.outbox.bodies import Bodies
from receiver.outbound.outbox.clients import Clients
from receiver.states import OutboxState
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.identifiers import uuid7
from receiver.storage.queue import outbox
from receiver.storage.queue.outbox import NewRequest, RequestOutcome

log: Final = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The caller of an operation. `name`: for the audit (USER@HOST, or handler:NAME).

    `message_uuid`: the message that the call answers, if any. `destination`: the receiver's destination of that
    message. `reason`: the operator's reason, sealed in the audit.
    """

    name: str
    destination: str | None = None
    message_uuid: UUID | None = None
    reason: str | None = None


class OutboundRecorder:
    """Records the calls of one process in one audit chain. Safe in threads."""

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        seals = Sealer(keyring)
        self.bodies: Final = Bodies(seals)
        self.digests: Final = KeyedDigests(keyring)
        self._audit = AuditChain(keyring, seals)
        self._lock = threading.Lock()

    @contextmanager
    def transaction(self) -> Iterator[tuple[Connection, list[AuditEvent]]]:
        """Open a transaction that writes the audit events in the list when it commits. A rollback writes none.

        Raises SQLAlchemyError.
        """
        with self._lock:
            try:
                with self._engine.begin() as connection:
                    events: list[AuditEvent] = []
                    yield connection, events
                    write(connection, self._audit, events)
            except BaseException:
                self._audit.restart()
                raise


def begun(call: Call, subject: str, caller: Caller, api_key: str, attempt: int, digests: KeyedDigests) -> AuditEvent:
    """Make the audit event before an attempt, with the length and keyed digest of the request."""
    detail: dict[str, Any] = {"api_key": api_key, "kind": call.kind, "to": list(call.to), "attempt": attempt}
    if call.body is not None:
        detail |= {"length": len(call.body), "digest": digests.content(call.body).hex()}
    return _event(call.name, "begun", subject, caller, detail)


def ended(call: str, outcome: str, subject: str, caller: Caller, end: RequestOutcome, attempt: int) -> AuditEvent:
    """Make the audit event after an attempt. `outcome`: sent, failed, or dead (given up by the outbox)."""
    return _event(
        call,
        outcome,
        subject,
        replace(caller, reason=None),
        {"attempt": attempt, "status": end.status, "error": end.error_class, "log_ids": list(end.log_ids)},
    )


def _event(call: str, outcome: str, subject: str, caller: Caller, detail: dict[str, Any]) -> AuditEvent:
    return AuditEvent(
        action=f"outbound.{call}",
        outcome=outcome,
        at=datetime.now(UTC),
        actor=caller.name,
        destination=caller.destination,
        message_uuid=caller.message_uuid,
        subject=subject,
        detail=detail,
        note=caller.reason,
    )


def sent(answer: Answer, uuid: UUID, bodies: Bodies) -> RequestOutcome:
    """Return the RequestOutcome of an attempt with a response."""
    key_id, sealed = bodies.seal_answer(answer.body, uuid)
    return RequestOutcome(
        state=OutboxState.SENT, status=answer.status, log_ids=answer.log_ids, answer_key=key_id, answer=sealed
    )


def refused(exc: BaseException, uuid: UUID, bodies: Bodies) -> RequestOutcome:
    """Return the RequestOutcome of a failed attempt. The state is "dead"; the outbox may change it."""
    if not isinstance(exc, OutboundError):
        return RequestOutcome(state=OutboxState.DEAD, error_class=type(exc).__name__)
    key_id, sealed = bodies.seal_errors(exc.details, uuid)
    return RequestOutcome(
        state=OutboxState.DEAD,
        status=exc.status,
        error_class=type(exc).__name__,
        log_ids=exc.log_ids,
        answer_key=key_id,
        answer=sealed,
    )


class RecordedClient(RedoxApi):
    """A RedoxClient that records its calls in the name of one caller."""

    def __init__(self, clients: Clients, recorder: OutboundRecorder, api_key: str, caller: Caller) -> None:
        self._client: RedoxClient = clients.client(api_key)
        self._recorder = recorder
        self._api_key = api_key
        self._caller = caller
        super().__init__(self._client.profile, self._client.limits)

    def carry_out(self, call: Call, file: FilePart | None = None) -> Answer:
        """Send the call. Raises as RedoxClient does, and SQLAlchemyError if the call cannot be recorded first."""
        uuid, number = self._begin(call, file)
        try:
            answer = self._client.carry_out(call, file)
        except BaseException as exc:
            self._end(call, number, refused(exc, uuid, self._recorder.bodies))
            raise
        self._end(call, number, sent(answer, uuid, self._recorder.bodies))
        return answer

    def _begin(self, call: Call, file: FilePart | None) -> tuple[UUID, int]:
        kept = call if file is None else replace(call, body=_content(file))
        uuid, caller = uuid7(), self._caller
        key_id, sealed = self._recorder.bodies.seal_call(kept, uuid, self._api_key)
        with self._recorder.transaction() as (connection, events):
            number = outbox.put(
                connection,
                NewRequest(
                    uuid=uuid,
                    api_key=self._api_key,
                    lane=None,
                    call=call.name,
                    kind=call.kind,
                    created_by=caller.name,
                    message_uuid=caller.message_uuid,
                    destination=caller.destination,
                    request_key=key_id,
                    request=sealed,
                ),
            )
            events.append(begun(kept, _subject(number), caller, self._api_key, 1, self._recorder.digests))
        return uuid, number

    def _end(self, call: Call, number: int, end: RequestOutcome) -> None:
        try:
            with self._recorder.transaction() as (connection, events):
                outbox.end_direct(connection, number, end)
                outcome = "sent" if end.state == OutboxState.SENT else "failed"
                events.append(ended(call.name, outcome, _subject(number), self._caller, end, 1))
        except (SQLAlchemyError, ReceiverError) as exc:
            # Redox has processed the call, and an error here must not make the caller repeat it. The row shows that the
            # end is unknown.
            log.error(
                "outbound.end_not_recorded",
                subject=_subject(number),
                error=describe(exc) if isinstance(exc, SQLAlchemyError) else type(exc).__name__,
            )


def _subject(number: int) -> str:
    return f"outbound_requests:{number}"


def _content(file: FilePart) -> bytes:
    content = file[1]
    if isinstance(content, bytes):
        return content
    content.seek(0)
    return content.read()
