"""Records what is admitted and what is refused: the group commit, and every rule that keeps it right.

One thread a process takes what waits, writes it in one transaction, and answers each request after the COMMIT. May not
judge: what comes in here has its verdict. Started after fork, by whoever composes the process.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from receiver.errors import ReceiverError, Unavailable
from receiver.keyring import Keyring
from receiver.pipeline import Admitted, Challenged, Receipt, Refused
from receiver.protocol.message import Message
from receiver.protocol.sources import ID_SHAPE
from receiver.storage import statements
from receiver.storage.audit import AuditChain, AuditEvent, Flood
from receiver.storage.database import describe, sqlstate
from receiver.storage.dispatch import NewDelivery, deliveries
from receiver.storage.evidence import PatientDigests, mac_key, row_mac
from receiver.storage.identifiers import uuid7
from receiver.storage.sealing import Seals, payload_binding

log: Final = structlog.get_logger(__name__)

# A request is answered within five seconds, with 503 if need be: a statement may take four. A frozen server fires no
# time-out of its own, so the watchdog closes the socket.
PATIENCE: Final = 4.0
# A batch: beyond this, more rows save nothing, and their answers would wait for one another.
BATCH_ROWS: Final = 64
BATCH_BYTES: Final = 16 * 1024 * 1024
# What may wait for the writer before new requests are told to come back.
QUEUE_ROWS: Final = 1_000
QUEUE_BYTES: Final = 256 * 1024 * 1024
# Refusals that wait for the database to come back; older ones fall out, for a flood must not fill the memory.
EVENTS: Final = 10_000
# Refusals and handshakes are in the audit within a second.
_FLUSH: Final = 0.5
_LAST_USED: Final = 60.0
# An identical body without any id may be meant to come again after a day.
KEY_LIFETIME: Final = timedelta(hours=24)
# How old the sum of quarantined bytes may be when it is compared with the quota.
_QUOTA_AGE: Final = 5.0

_RETRY: Final = frozenset({"40001", "40P01"})
_ATTEMPTS: Final = 3
_DUPLICATE: Final = "23505"
# Classes of errors that one row's values cause: data exceptions, integrity, program limits.
_DATA: Final = ("22", "23", "54")


@dataclass(slots=True, eq=False)
class _Entry:
    """One admitted message on its way: sealed and signed in the request's own thread, written by the writer.

    `repeats` are entries of the same batch that say the same: they are answered as its duplicates.
    """

    admitted: Admitted
    row: dict[str, Any] = field(repr=False)
    deliveries: list[NewDelivery]
    enqueued: float
    future: Future[Receipt] = field(default_factory=Future)
    repeats: list[_Entry] = field(default_factory=list)

    @property
    def identity(self) -> tuple[int, bytes, bytes] | None:
        """What makes another entry its duplicate; None for a query, which is never one."""
        row = self.row
        return None if row["key"] is None else (row["destination_id"], row["key"], row["outside"])

    def event(self, outcome: str, message_uuid: UUID) -> AuditEvent:
        """The audit row that tells what was made of it."""
        admitted = self.admitted
        return AuditEvent(
            action="message.receive", outcome=outcome, at=self.row["received_at"], actor="redox",
            reason=self.row["quarantine_reason"], peer=self.row["peer"], destination=admitted.destination.name,
            message_uuid=message_uuid,
            detail={"credentials": admitted.verified.credentials, "attempt": self.row["attempt_id"]})


@dataclass(slots=True, eq=False)
class _Urgent:
    """An audit row that somebody waits for."""

    event: AuditEvent
    enqueued: float
    future: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Known:
    """The message that an entry repeats."""

    id: int
    uuid: UUID
    state: str


class _BadRow(Exception):
    """The database takes no batch with this row in it."""


class Ledger:
    """All that the doors write. `start` and `stop` frame its life in one process; safe in threads."""

    def __init__(self, engine: Engine, keyring: Keyring, *, quarantine_quota: int,
                 on_commit: Callable[[Sequence[str]], None] = lambda _lanes: None) -> None:
        self._engine = engine
        self._seals = Seals(keyring)
        self._digests = PatientDigests(keyring)
        mac = keyring.current("mac")
        self._mac_key_id, self._mac_key = mac.id, mac_key(mac)
        self._quota = quarantine_quota
        self._on_commit = on_commit
        self._chain = AuditChain(keyring, self._seals)
        self._flood = Flood()

        self._wake = threading.Condition()
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._urgent: deque[_Urgent] = deque()
        self._events: deque[AuditEvent] = deque(maxlen=EVENTS)
        self._used: dict[int, datetime] = {}
        self._stopping = False
        self._writer = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="ledger-watchdog", daemon=True)

        # Of the writer alone, but for the three that the watchdog looks at.
        self._connection: Connection | None = None
        self._socket: int | None = None
        self._busy_since: float | None = None
        self._in_hand: Sequence[_Entry | _Urgent] = ()
        self._flushed = self._used_flushed = time.monotonic()
        self._quarantined: dict[int, tuple[float, int]] = {}

    # --- what doors call

    def start(self) -> None:
        """Begin to write. Only after fork: threads and sockets do not survive one."""
        self._writer.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Write what waits, then end. Whoever comes after is told that the ledger is unavailable."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._writer.join(2 * PATIENCE)

    def accept(self, admitted: Admitted) -> Future[Receipt]:
        """Record it. The future holds the Receipt after the COMMIT, or raises Unavailable, whose reason is for the log."""
        entry = self._entry(admitted)
        for credential in admitted.verified.credentials:
            self._used[credential] = entry.row["received_at"]
        with self._wake:
            if self._stopping:
                entry.future.set_exception(Unavailable("shutting_down"))
            elif len(self._waiting) >= QUEUE_ROWS or self._waiting_bytes + entry.row["size"] > QUEUE_BYTES:
                entry.future.set_exception(Unavailable("queue_full"))
            else:
                self._waiting.append(entry)
                self._waiting_bytes += entry.row["size"]
                self._wake.notify()
        return entry.future

    def refuse(self, refused: Refused) -> None:
        """Note a refusal: who, why, how long and which digest; never the body, a token or a header's value."""
        detail: dict[str, Any] = {"status": refused.status}
        if refused.body is not None:
            detail |= {"length": len(refused.body), "sha256": sha256(refused.body).hexdigest()}
        if refused.claimed_source is not None:
            # Only what is shaped like an id is kept as it is: anything else may be anybody's data.
            shaped = ID_SHAPE.fullmatch(refused.claimed_source) is not None
            detail |= {"source": refused.claimed_source if shaped else None,
                       "source_sha256": None if shaped else sha256(refused.claimed_source.encode()).hexdigest()}
        self._note(AuditEvent(
            action="message.refuse", outcome="refused", at=refused.head.received_at, actor="unverified" if refused.verified
            is None else "redox", reason=refused.reason, peer=refused.head.peer,
            destination=refused.destination.name if refused.destination is not None else None, detail=detail))

    def challenged(self, challenged: Challenged) -> None:
        """Note an answered handshake."""
        self._note(AuditEvent(
            action="destination.handshake", outcome="answered", at=challenged.head.received_at, actor="redox",
            peer=challenged.head.peer, destination=challenged.destination.name,
            subject=f"credentials:{challenged.credential}"))

    def record(self, event: AuditEvent) -> Future[None]:
        """Write one audit row; the future is done after its COMMIT, or raises Unavailable."""
        urgent = _Urgent(event, time.monotonic())
        with self._wake:
            if self._stopping:
                urgent.future.set_exception(Unavailable("shutting_down"))
            else:
                self._urgent.append(urgent)
                self._wake.notify()
        return urgent.future

    def _note(self, event: AuditEvent) -> None:
        with self._wake:
            self._events.extend(self._flood.take(event, time.monotonic()))

    # --- preparing, in the request's thread

    def _entry(self, admitted: Admitted) -> _Entry:
        inbound, message = admitted.inbound, admitted.message
        body = inbound.body
        uuid = uuid7()
        payload_key, sealed = self._seals.seal_body(body, payload_binding(str(uuid)))
        new = [] if message is None or admitted.quarantine else deliveries(message, admitted.destination, self._digests)
        row = _columns(message) | {
            "id": None, "uuid": uuid, "destination_id": admitted.destination.id,
            "credential_ids": list(admitted.verified.credentials), "query": admitted.query is not None,
            "received_at": inbound.head.received_at, "peer": inbound.head.peer, "sha256": sha256(body).digest(),
            "size": len(body), "content_type": _clean(inbound.head.headers.get("content-type")),
            "state": _state(admitted, new), "quarantine_reason": admitted.quarantine, "id_conflict": False,
            "payload_key": payload_key, "sealed": sealed}
        if message is not None and message.key_expires:
            row["key_expires_at"] = inbound.head.received_at + KEY_LIFETIME
        elif message is None:
            # Unreadable bytes that come again are the same unreadable bytes; an unreadable query is nobody's repeat.
            digest = None if row["query"] else row["sha256"]
            row |= {"key": digest, "outside": digest, "key_expires_at": inbound.head.received_at + KEY_LIFETIME}
        row["mac"] = row_mac(self._mac_key, "messages", row)
        row["mac_key"] = self._mac_key_id
        row["credential_ids"] = "{" + ",".join(map(str, row["credential_ids"])) + "}"  # an array in an array of rows
        return _Entry(admitted=admitted, row=row, deliveries=new, enqueued=time.monotonic())

    # --- the writer's thread

    def _run(self) -> None:
        while True:
            entries, urgent = self._take()
            events = self._drain_events()
            self._in_hand = (*entries, *urgent)
            self._busy_since = time.monotonic()
            try:
                self._write(_fold(self._within_quota(entries)), events, urgent)
                if time.monotonic() - self._used_flushed >= _LAST_USED:
                    self._flush_used()
            except Exception as exc:  # noqa: BLE001 - the writer outlives whatever a batch does to it
                log.error("ledger.failed", error=type(exc).__name__)
                self._disconnect()
                _fail(self._in_hand, Unavailable("ledger_failed"))
            finally:
                self._busy_since, self._in_hand = None, ()
            if self._stopping and not entries and not urgent:
                break
        self._disconnect()

    def _take(self) -> tuple[list[_Entry], list[_Urgent]]:
        """What waits, bounded in rows and bytes; nothing when it is only time to flush the audit."""
        with self._wake:
            if not self._waiting and not self._urgent and not self._stopping:
                self._wake.wait(_FLUSH)
            entries: list[_Entry] = []
            size = 0
            while self._waiting and len(entries) < BATCH_ROWS and (
                    not entries or size + self._waiting[0].row["size"] <= BATCH_BYTES):
                entry = self._waiting.popleft()
                size += entry.row["size"]
                entries.append(entry)
            self._waiting_bytes -= size
            urgent = [self._urgent.popleft() for _ in range(min(len(self._urgent), BATCH_ROWS))]
        return entries, urgent

    def _drain_events(self) -> list[AuditEvent]:
        """The refusals that are due."""
        now = time.monotonic()
        with self._wake:
            self._events.extend(self._flood.end(now) if self._stopping else self._flood.due(now))
            if not self._stopping and now - self._flushed < _FLUSH:
                return []
            self._flushed = now
            return [self._events.popleft() for _ in range(min(len(self._events), QUEUE_ROWS))]

    def _write(self, entries: list[_Entry], events: list[AuditEvent], urgent: Sequence[_Urgent] = ()) -> None:
        """Write all of it in one commit and answer; where one row spoils it, each for itself."""
        if not entries and not events and not urgent:
            return
        try:
            lanes = self._commit(entries, [*events, *(each.event for each in urgent)])
        except Unavailable as exc:
            _fail((*entries, *urgent), exc)
            with self._wake:
                self._events.extendleft(reversed(events[:EVENTS - len(self._events)]))
        except _BadRow:
            self._write_apart(entries, events, urgent)
        else:
            for each in urgent:
                _settle(each.future, None)
            if lanes:
                self._on_commit(lanes)

    def _write_apart(self, entries: list[_Entry], events: list[AuditEvent], urgent: Sequence[_Urgent]) -> None:
        """Find the row that the database does not take: it hurts itself alone."""
        if len(entries) + len(events) + len(urgent) > 1:
            for entry in entries:
                self._write([entry], [])
            for event in events:
                self._write([], [event])
            for each in urgent:
                self._write([], [], [each])
        elif entries and entries[0].row["quarantine_reason"] != _UNSTORABLE:
            # Its columns for asking are what the database refuses; the exact bytes can be kept all the same.
            log.error("ledger.unstorable", uuid=str(entries[0].row["uuid"]))
            self._write([self._bare(entries[0])], [])
        else:
            log.error("ledger.row_refused", action=events[0].action if events else "message.receive")
            _fail((*entries, *urgent), Unavailable("row_refused"))

    def _commit(self, entries: list[_Entry], events: list[AuditEvent]) -> list[str]:
        """One transaction; answers the entries; returns the lanes that have something new.

        Raises Unavailable when it cannot be written now, _BadRow when a value in it is the reason.
        """
        for attempt in range(_ATTEMPTS):
            try:
                connection = self._connect()
                # The short way takes every key for new. It is nearly always right, and one round trip.
                return self._longer(connection, entries, events) if attempt else self._short(connection, entries, events)
            except SQLAlchemyError as exc:
                code = sqlstate(exc)
                if not self._rolled_back(exc, code):
                    log.error("ledger.connection_lost", error=describe(exc))
                    raise Unavailable("database_away") from exc
                if code in _RETRY or (code == _DUPLICATE and attempt == 0):
                    continue
                if code is not None and code.startswith(_DATA):
                    raise _BadRow from exc
                log.error("ledger.refused", error=describe(exc))
                raise Unavailable("database_refuses") from exc
        raise Unavailable("conflicts")

    def _short(self, connection: Connection, entries: list[_Entry], events: list[AuditEvent]) -> list[str]:
        """Everything in one statement, which is its own transaction. Raises 23505 when a key is there already."""
        rows = self._chain.rows([*events, *(event for entry in entries for event in _events(entry))])
        written = self._record(connection, statements.RECORD, entries, rows)
        self._chain.written(rows)
        return _answer(entries, written)

    def _longer(self, connection: Connection, entries: list[_Entry], events: list[AuditEvent]) -> list[str]:
        """The way of duplicates: claim the keys, look for what others hold, take up what of it was left undone."""
        connection.exec_driver_sql("BEGIN")
        keyed = [entry for entry in entries if entry.identity is not None]
        keys = statements.key_arrays([entry.row for entry in keyed])
        claimed = {(r[0], bytes(r[1]), bytes(r[2])): r[3] for r in connection.exec_driver_sql(statements.CLAIM_KEYS, keys)}
        known: dict[Any, _Known] = {}
        if len(claimed) < len(keyed):
            known = {(r[0], bytes(r[1]), bytes(r[2])): _Known(*r[3:])
                     for r in connection.exec_driver_sql(statements.EXISTING, keys)}
        fresh = [entry for entry in entries if entry.identity is None or entry.identity in claimed]
        repeats = [(entry, known[entry.identity]) for entry in keyed if entry.identity not in claimed]
        for entry in fresh:
            entry.row["id"] = None if entry.identity is None else claimed[entry.identity]
        lanes = [lane for entry, message in repeats for lane in self._take_up(connection, entry, message)]
        told = [*events, *(event for entry in fresh for event in _events(entry)),
                *(event for entry, message in repeats for event in _events(entry, message.uuid))]
        rows = self._chain.rows(told)
        written = self._record(connection, statements.RECORD_WITHOUT_KEYS, fresh, rows)
        inline = {message.id: _inline(connection, message.id) for _, message in repeats}
        connection.exec_driver_sql("COMMIT")
        self._chain.written(rows)
        for entry, message in repeats:
            receipt = Receipt(message_id=message.id, uuid=str(message.uuid), outcome="duplicate", inline=inline[message.id])
            for each in (entry, *entry.repeats):
                _settle(each.future, receipt)
        return lanes + _answer(fresh, written)

    def _record(self, connection: Connection, statement: str, entries: list[_Entry], audit: list[dict[str, Any]],
                ) -> dict[UUID, tuple[int, tuple[int, ...]]]:
        """Run the recording statement: uuid → (message id, its inline deliveries)."""
        arrays = statements.audit_arrays(audit)
        if not entries:
            if audit:
                connection.exec_driver_sql(statements.AUDIT, arrays)
            return {}
        arrays |= statements.message_arrays([entry.row for entry in entries])
        arrays |= statements.delivery_arrays([row for entry in entries for row in _delivery_rows(entry)])
        return {r[0]: (r[1], tuple(r[2])) for r in connection.exec_driver_sql(statement, arrays)}

    def _take_up(self, connection: Connection, entry: _Entry, message: _Known) -> list[str]:
        """Seen is not done: what of the message is dead, unhandled or quarantined runs after all. The lanes of it."""
        lanes = [row.lane for row in connection.exec_driver_sql(statements.REVIVE_DEAD, {"message_id": message.id})]
        if message.state in ("unhandled", "quarantined") and entry.row["state"] == "accepted":
            arrays = statements.delivery_arrays(list(_delivery_rows(entry)))
            lanes += connection.exec_driver_sql(statements.ADD_DELIVERIES, arrays | {"message_id": message.id}).scalars()
        if message.state in ("unhandled", "quarantined") and entry.row["quarantine_reason"] is None:
            connection.exec_driver_sql(statements.TAKE_UP, {"id": message.id, "state": entry.row["state"]})
        return lanes

    def _bare(self, entry: _Entry) -> _Entry:
        """The entry without any column that tells of its content: quarantined, and the same bytes."""
        row = entry.row | _columns(None) | {"state": "quarantined", "quarantine_reason": _UNSTORABLE, "content_type": None,
                                            "key": entry.row["key"], "outside": entry.row["outside"],
                                            "key_expires_at": entry.row["key_expires_at"]}
        row["mac"] = row_mac(self._mac_key, "messages",
                             row | {"credential_ids": list(entry.admitted.verified.credentials)})
        entry.row, entry.deliveries = row, []
        return entry

    def _within_quota(self, entries: list[_Entry]) -> list[_Entry]:
        """The entries that may be written: quarantine holds so many bytes a destination, then Redox must keep them."""
        kept = []
        for entry in entries:
            if entry.row["state"] == "quarantined" and not self._fits(entry):
                log.error("quarantine.full", destination=entry.admitted.destination.name)
                _settle(entry.future, Unavailable("quarantine_full"))
            else:
                kept.append(entry)
        return kept

    def _fits(self, entry: _Entry) -> bool:
        destination = entry.row["destination_id"]
        asked, held = self._quarantined.get(destination, (float("-inf"), 0))
        if time.monotonic() - asked > _QUOTA_AGE:
            try:
                found = self._connect().exec_driver_sql(statements.QUARANTINED_BYTES, {"destination_id": destination})
                asked, held = time.monotonic(), found.scalar_one()
            except SQLAlchemyError as exc:
                if not self._rolled_back(exc, sqlstate(exc)):
                    log.error("ledger.connection_lost", error=describe(exc))
                return False
        self._quarantined[destination] = (asked, held + entry.row["size"])
        return bool(held + entry.row["size"] <= self._quota)

    def _flush_used(self) -> None:
        """Tell the database when each credential was last used; what is lost here is used again."""
        self._used_flushed = time.monotonic()
        used, self._used = self._used, {}
        if used:
            try:
                self._connect().exec_driver_sql(statements.LAST_USED, {"id": list(used), "at": list(used.values())})
            except SQLAlchemyError as exc:
                self._rolled_back(exc, sqlstate(exc))
                log.warning("ledger.last_used_not_written", error=describe(exc))

    # --- the connection

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            driver = self._connection.connection.driver_connection
            assert driver is not None
            self._socket = driver.pgconn.socket
        return self._connection

    def _rolled_back(self, exc: SQLAlchemyError, code: str | None) -> bool:
        """Whether the server says that nothing was written, and the connection lives. Otherwise it is given up.

        Where the answer never came, the rows may be there or not: the chain begins anew, and Redox sends again.
        """
        invalidated = isinstance(exc, DBAPIError) and exc.connection_invalidated
        if self._connection is not None and code is not None and not invalidated:
            try:
                if self._connection.connection.driver_connection.info.transaction_status:  # type: ignore[union-attr]
                    self._connection.exec_driver_sql("ROLLBACK")
            except SQLAlchemyError:
                pass
            else:
                return True
        self._disconnect()
        return False

    def _disconnect(self) -> None:
        connection, self._connection, self._socket = self._connection, None, None
        self._chain.restart()
        if connection is not None:
            connection.invalidate()
            connection.close()

    # --- the watchdog's thread

    def _watch(self) -> None:
        """Answer whoever has waited too long, and free the writer from a server that does not answer."""
        while self._writer.is_alive():
            time.sleep(_WATCH)
            late = time.monotonic() - PATIENCE
            with self._wake:
                while self._waiting and self._waiting[0].enqueued < late:
                    entry = self._waiting.popleft()
                    self._waiting_bytes -= entry.row["size"]
                    _settle(entry.future, Unavailable("timed_out"))
            _fail([each for each in self._in_hand if each.enqueued < late], Unavailable("timed_out"))
            if self._busy_since is not None and self._busy_since < late and self._socket is not None:
                _cut(self._socket)


_UNSTORABLE: Final = "unstorable_columns"
_WATCH: Final = 0.2


def _cut(descriptor: int) -> None:
    """Shut a connection down from another thread: whoever waits on it gets an error at once."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as double:
            double.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already


def _fold(entries: Iterable[_Entry]) -> list[_Entry]:
    """The entries, each that says the same as an earlier one put under it; those of one key that differ are flagged."""
    leaders: dict[Any, _Entry] = {}
    keys: set[tuple[int, bytes]] = set()
    folded = []
    for entry in entries:
        identity = entry.identity
        if identity is not None:
            if identity in leaders:
                leaders[identity].repeats.append(entry)
                continue
            leaders[identity] = entry
            entry.row["id_conflict"] = identity[:2] in keys
            keys.add(identity[:2])
        folded.append(entry)
    return folded


def _events(entry: _Entry, known: UUID | None = None) -> list[AuditEvent]:
    """The audit rows of an entry and its repeats; `known` is the message that it repeats itself."""
    if known is not None:
        return [each.event("duplicate", known) for each in (entry, *entry.repeats)]
    uuid = entry.row["uuid"]
    return [entry.event(entry.row["state"], uuid), *(each.event("duplicate", uuid) for each in entry.repeats)]


def _answer(entries: list[_Entry], written: dict[UUID, tuple[int, tuple[int, ...]]]) -> list[str]:
    """After the COMMIT: every request gets its receipt. The lanes that a worker has to look at."""
    lanes = []
    for entry in entries:
        message_id, inline = written[entry.row["uuid"]]
        uuid = str(entry.row["uuid"])
        _settle(entry.future, Receipt(message_id=message_id, uuid=uuid, outcome=entry.row["state"], inline=inline))
        for repeat in entry.repeats:
            _settle(repeat.future, Receipt(message_id=message_id, uuid=uuid, outcome="duplicate", inline=inline))
        lanes += [each.lane for each in entry.deliveries if not each.inline]
    return lanes


def _inline(connection: Connection, message_id: int) -> tuple[int, ...]:
    return tuple(connection.exec_driver_sql(statements.INLINE_PENDING, {"message_id": message_id}).scalars())


def _fail(waiting: Iterable[_Entry | _Urgent], exc: ReceiverError) -> None:
    for each in waiting:
        _settle(each.future, exc)
        for repeat in each.repeats if isinstance(each, _Entry) else ():
            _settle(repeat.future, exc)


def _settle(future: Future[Any], result: object) -> None:
    """Answer, unless the watchdog did."""
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass


def _delivery_rows(entry: _Entry) -> Iterable[dict[str, Any]]:
    return ({"d_uuid": entry.row["uuid"], "d_destination_id": entry.row["destination_id"], "d_handler": each.handler,
             "d_lane": each.lane, "d_inline": each.inline} for each in entry.deliveries)


def _state(admitted: Admitted, new: Sequence[NewDelivery]) -> str:
    """What the message is as soon as it is written. A query is its responder's, so it never waits for a handler."""
    if admitted.quarantine is not None:
        return "quarantined"
    return "accepted" if new or admitted.query else "unhandled"


def _columns(message: Message | None) -> dict[str, Any]:
    """The columns for asking; all null for what could not be read."""
    if message is None:
        return dict.fromkeys(_ASKED) | {"test": False, "key": None, "outside": None, "key_expires_at": None}
    row: dict[str, Any] = {name: getattr(message, name) for name in _ASKED}
    # A query is never a duplicate: its answer would be missing.
    key = None if message.query else message.key
    return row | {"test": message.test, "key": key, "outside": message.outside, "key_expires_at": None}


_ASKED: Final = ("source_id", "kind", "log_id", "attempt_id", "message_id", "transmission_id", "facility", "event_time")


def _clean(text: str | None) -> str | None:
    return None if text is None else text.replace("\0", "")[:200]
