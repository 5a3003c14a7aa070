"""The ledger: the calls with which endpoints record admitted and refused requests.

Must not decide about messages: each arrives with its verdict. The parts are receiver.storage.accept.message_builder
(prepares rows), receiver.storage.accept.group_commit (queues) and receiver.storage.accept.batch (writes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.pipeline import Admitted, Challenged, Receipt, Refused
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination
from receiver.protocol.sources import ID_SHAPE
from receiver.storage.accept.batch import BatchWriter
from receiver.storage.accept.group_commit import COMMIT_TIMEOUT, GroupCommitWriter
from receiver.storage.accept.message_builder import MessageBuilder, PendingAudit
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests

__all__ = ["COMMIT_TIMEOUT", "MessageLedger"]


class MessageLedger:
    """Everything that endpoints write. `start` and `stop` delimit its lifetime in one process. Thread-safe.

    `quarantine_quota`: bytes for each destination. The writer calls `on_commit` with the lanes that have new work. It
    must be quick, and may fail.
    """

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        quarantine_quota: int,
        on_commit: Callable[[Sequence[str]], None] = lambda _lanes: None,
    ) -> None:
        seals = Sealer(keyring)
        self._digests = KeyedDigests(keyring)
        self._entries = MessageBuilder(keyring, seals)
        # A statement times out a little before the watchdog acts: an error from the server is better than a cut
        # connection.
        recorder = BatchWriter(engine, keyring, seals, timeout=COMMIT_TIMEOUT - 0.5)
        self._writer = GroupCommitWriter(
            recorder, self._entries, quarantine_quota=quarantine_quota, on_commit=on_commit
        )

    def start(self) -> None:
        """Start the threads. Call it after fork: threads and sockets do not survive one."""
        self._writer.start()

    def stop(self) -> None:
        """Write what is queued, then stop. Later calls raise Unavailable."""
        self._writer.stop()

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        """Record the message. The future holds the Receipt after the COMMIT, or raises Unavailable with a fixed word.

        `batch`: it waits for `flush`, so that concurrent requests share one commit.
        """
        entry = self._entries.make(admitted)
        self._writer.put(entry)
        if not batch:
            self._writer.flush()
        return entry.future

    def flush(self) -> None:
        """Write the batch now: its requests wait."""
        self._writer.flush()

    def refuse(self, refused: Refused) -> None:
        """Record a refusal: peer, reason, length and keyed digest. Never the body, a token or a header's value."""
        detail: dict[str, Any] = {"status": refused.status}
        if refused.query is not None:
            detail["query"] = True  # a query is not repeated, so that no feed is paused for it
        if refused.body is not None:
            detail |= {"length": len(refused.body), "digest": self._digests.content(refused.body).hex()}
        if refused.claimed_source is not None:
            # Only a value shaped like an id is kept as it is: anything else may be a patient's data.
            shaped = ID_SHAPE.fullmatch(refused.claimed_source) is not None
            detail |= {
                "source": refused.claimed_source if shaped else None,
                "source_digest": None if shaped else self._digests.source(refused.claimed_source).hex(),
            }
        self._writer.note(
            AuditEvent(
                action="message.refuse",
                outcome="refused",
                at=refused.head.received_at,
                actor="unverified" if refused.verified is None else "redox",
                reason=refused.reason,
                peer=refused.head.peer,
                destination=refused.destination.name if refused.destination is not None else None,
                detail=detail,
            )
        )

    def unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool) -> None:
        """Record a request that was answered 503. Written when the database is available again; in a flood only
        counted.
        """
        self._writer.note(
            AuditEvent(
                action="message.refuse",
                outcome="unavailable",
                at=head.received_at,
                actor="redox" if proved else "unverified",
                reason=reason,
                peer=head.peer,
                destination=None if destination is None else destination.name,
                detail={"status": 503},
            )
        )

    def challenged(self, challenged: Challenged) -> None:
        """Record an answered handshake."""
        self._writer.note(
            AuditEvent(
                action="destination.handshake",
                outcome="answered",
                at=challenged.head.received_at,
                actor="redox",
                peer=challenged.head.peer,
                destination=challenged.destination.name,
                subject=f"credentials:{challenged.credential}",
            )
        )

    def note(self, event: AuditEvent) -> None:
        """Queue one audit row that no caller waits for. In a flood it is only counted."""
        self._writer.note(event)

    def record(self, event: AuditEvent) -> Future[None]:
        """Write one audit row. The future is done after its COMMIT, or raises Unavailable."""
        urgent = PendingAudit(event)
        self._writer.put_urgent(urgent)
        return urgent.future
