"""Batch writer: one database connection, through which each batch is written in one commit, duplicates included.

Must not know futures or threads (see group_commit). Used by one thread; only `cut` may be called from another.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
import structlog
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from receiver.database.engine import dedicated, describe, sqlstate
from receiver.errors import Unavailable
from receiver.fault_injection.faults import point
from receiver.keyring import Keyring
from receiver.pipeline import Receipt
from receiver.storage.accept import sql
from receiver.storage.accept.duplicates import claim, dispatchable, inline_pending, repeat_receipt, resume
from receiver.storage.accept.message_builder import PendingMessage
from receiver.storage.accept.prepared import PreparedStatements
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.flood_control import Repeats

log: Final = structlog.get_logger(__name__)

_sending, _claimed, _committing = point("ledger.sending"), point("ledger.claimed"), point("ledger.committing")

# Serialization failure, deadlock: a retry of the same batch succeeds.
_RETRIABLE: Final = frozenset({"40001", "40P01"})
_ATTEMPTS: Final = 3
_DUPLICATE: Final = "23505"
# Error classes that one row's values cause: data exceptions, integrity, program limits.
_DATA_ERRORS: Final = ("22", "23", "54")

# (message id, its inline deliveries) of each message, in their order.
_Written = Sequence[tuple[int, tuple[int, ...]]]


class UnwritableRow(Exception):
    """The database refuses every batch that contains this row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """The result of a batch: a receipt for each entry, in order, and the lanes that have new work.

    `counted`: repeats that have no audit row of their own and are only counted.
    """

    receipts: Sequence[Receipt]
    lanes: Sequence[str]
    counted: Sequence[AuditEvent] = ()


class BatchWriter:
    """Writes batches under one keyring, through its own connection. `timeout`: seconds for a statement."""

    def __init__(self, engine: Engine, keyring: Keyring, seals: Sealer, *, timeout: float) -> None:
        self._engine = dedicated(engine, timeout=timeout)
        # Before all other listeners: those of SQLAlchemy query the server, and may wait for it forever.
        event.listen(self._engine, "connect", self._keep_socket, insert=True)
        self._chain = AuditChain(keyring, seals)
        self._repeats = Repeats()
        self._connection: Connection | None = None
        self._prepared: PreparedStatements | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def record(self, entries: Sequence[PendingMessage], events: Sequence[AuditEvent]) -> Recorded:
        """Write the whole batch in one commit, or nothing.

        Raises Unavailable, with a fixed word, when it cannot be written now; UnwritableRow when a value in it is the
        cause.
        """
        for attempt in range(_ATTEMPTS):
            try:
                # The fast path assumes that every key is new. This is nearly always true, and costs one round trip.
                return self._duplicate_path(entries, events) if attempt else self._fast_path(entries, events)
            except (SQLAlchemyError, psycopg.Error) as exc:
                self._check_retry(exc, attempt)
            except Exception as exc:
                # A value that cannot even be sent, such as text that is not UTF-8, is a bad row too.
                log.error("ledger.unsendable", error=type(exc).__name__)
                self.close()
                raise UnwritableRow from exc
        raise Unavailable("conflicts")

    def quarantined(self, destination_id: int) -> int:
        """Return the bytes of quarantined bodies at that destination. Raises Unavailable."""
        try:
            found = self._connected().exec_driver_sql(sql.QUARANTINED_BYTES, {"destination_id": destination_id})
            return int(found.scalar_one())
        except SQLAlchemyError as exc:
            raise self._connection_failed(exc) from exc

    def credentials_used(self, used: Mapping[int, datetime]) -> None:
        """Record when each credential, by id, was last used. Raises Unavailable."""
        ids = sorted(used)  # the same order in every process, so that two do not deadlock
        try:
            self._connected().exec_driver_sql(sql.LAST_USED, {"id": ids, "at": [used[each] for each in ids]})
        except SQLAlchemyError as exc:
            raise self._connection_failed(exc) from exc

    def cut(self) -> None:
        """Close the socket from another thread: the thread that waits on the connection gets an error at once.

        A frozen server does not enforce its timeouts, and no cancellation reaches it.
        """
        # An error means that the server closed the connection first.
        with self._lock, suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Discard the connection. The next batch opens a new one."""
        connection, self._connection, self._prepared = self._connection, None, None
        # The end of the chain is unknown: a batch without an answer may or may not be committed.
        self._chain.restart()
        if connection is not None:
            connection.invalidate()
            connection.close()
        self._close_socket()

    # --- the fast path and the duplicate path

    def _fast_path(self, entries: Sequence[PendingMessage], events: Sequence[AuditEvent]) -> Recorded:
        """Write everything in one statement, which is its own transaction. Raises 23505 when a key exists already."""
        audited, counted = self._repeats.split(_events(entries), time.monotonic())
        self._chain.follow(self._connected())
        rows = self._chain.rows([*events, *audited])
        _sending()
        if len(entries) == len(rows) == 1:
            written = _written(
                self._statements().run(
                    sql.RECORD_ALONE,
                    sql.alone(entries[0].row, entries[0].sealed, list(entries[0].delivery_rows()), rows[0]),
                )
            )
        else:
            written = self._write(entries, rows, with_keys=True)
        self._chain.written(rows)
        self._repeats.written(audited)
        return Recorded(receipts=list(map(_receipt, entries, written)), lanes=_lanes(entries), counted=counted)

    def _duplicate_path(self, entries: Sequence[PendingMessage], events: Sequence[AuditEvent]) -> Recorded:
        """Write a batch with duplicates: claim the keys, find the known messages, and take up what is left undone of
        them.
        """
        connection = self._connected()
        connection.exec_driver_sql(sql.BEGIN)
        known = claim(connection, [entry for entry in entries if entry.identity is not None])
        _claimed()
        fresh = [entry for entry in entries if entry.identity not in known]
        repeats = [(entry, known[entry.identity]) for entry in entries if entry.identity in known]
        repeated, lanes = list[AuditEvent](), []
        for entry, message in repeats:
            taken_up, woken = resume(connection, entry, message)
            repeated += entry.repeat_events(message.uuid, taken_up)
            lanes += woken
        audited, counted = self._repeats.split([*repeated, *_events(fresh)], time.monotonic())
        self._chain.follow(connection)
        rows = self._chain.rows([*events, *audited])
        written = iter(self._write(fresh, rows, with_keys=False))
        inline = {message.id: inline_pending(connection, message) for entry, message in repeats if dispatchable(entry)}
        _committing()
        connection.exec_driver_sql("COMMIT")
        self._chain.written(rows)
        self._repeats.written(audited)
        return Recorded(
            counted=counted,
            receipts=[
                repeat_receipt(known[entry.identity], inline)
                if entry.identity in known
                else _receipt(entry, next(written))
                for entry in entries
            ],
            lanes=[*lanes, *_lanes(fresh)],
        )

    def _write(
        self, entries: Sequence[PendingMessage], audit: Sequence[Mapping[str, Any]], *, with_keys: bool
    ) -> _Written:
        """Run the recording statement."""
        if entries:
            deliveries = [row for entry in entries for row in entry.delivery_rows()]
            return _written(
                self._statements().run(
                    sql.RECORD[with_keys, len(entries) == 1],
                    sql.batch([entry.row for entry in entries], [entry.sealed for entry in entries], deliveries, audit),
                )
            )
        if audit:
            self._statements().run(sql.AUDIT, sql.audit_rows(audit))
        return []

    # --- the connection

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._connection

    def _statements(self) -> PreparedStatements:
        """Return the prepared statements of the connection."""
        if self._prepared is None:
            driver = self._connected().connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            self._prepared = PreparedStatements(driver)
        return self._prepared

    def _keep_socket(self, driver: Any, _record: object) -> None:
        """Keep a duplicate of the socket's descriptor: the original number may be reused for another file."""
        self._close_socket()
        with self._lock:
            self._socket = socket.socket(fileno=os.dup(driver.pgconn.socket))

    def _close_socket(self) -> None:
        with self._lock:
            held, self._socket = self._socket, None
        if held is not None:
            held.close()

    def _check_retry(self, exc: SQLAlchemyError | psycopg.Error, attempt: int) -> None:
        """Return if the batch is to be written again. Raises what `record` raises."""
        code = sqlstate(exc) or ""
        if not code.startswith((*_DATA_ERRORS, *_RETRIABLE)) or not self._rolled_back():
            raise self._connection_failed(exc) from exc
        if code in _RETRIABLE or (code == _DUPLICATE and attempt < _ATTEMPTS - 1):
            return
        log.error("ledger.bad_row", error=describe(exc))
        raise UnwritableRow from exc

    def _rolled_back(self) -> bool:
        """Return whether the connection is alive, with nothing of the batch in it."""
        try:
            connection = self._connected()
            driver = connection.connection.driver_connection
            if driver is None or driver.info.transaction_status != TransactionStatus.IDLE:
                connection.exec_driver_sql("ROLLBACK")
        except SQLAlchemyError:
            return False
        return True

    def _connection_failed(self, exc: SQLAlchemyError | psycopg.Error) -> Unavailable:
        """Discard the connection, because the address may lead to another server now. Returns the error for the
        requests.
        """
        lost = (
            exc.connection_invalidated
            if isinstance(exc, DBAPIError)
            else self._prepared is None or (self._prepared.lost)
        )
        refused = sqlstate(exc) is not None and not lost
        log.error("ledger.refused" if refused else "ledger.connection_lost", error=describe(exc))
        self.close()
        return Unavailable("database_refuses" if refused else "database_away")


def _written(rows: Sequence[Sequence[bytes | None]]) -> _Written:
    """Parse the result of the recording statements: numbers, and arrays of them such as {1,2}."""
    return [
        (int(number or b""), tuple(map(int, inline[1:-1].split(b","))) if inline and inline != b"{}" else ())
        for number, inline in rows
    ]


def _receipt(entry: PendingMessage, written: tuple[int, tuple[int, ...]]) -> Receipt:
    message_id, inline = written
    return Receipt(message_id=message_id, uuid=str(entry.row["uuid"]), outcome=entry.row["state"], inline=inline)


def _events(entries: Iterable[PendingMessage]) -> Iterator[AuditEvent]:
    """Return the audit rows of new messages."""
    return (event for entry in entries for event in entry.events())


def _lanes(entries: Sequence[PendingMessage]) -> list[str]:
    """Return the lanes that need a worker. Inline deliveries run in the request."""
    return [each.lane for entry in entries for each in entry.deliveries if not each.inline]
