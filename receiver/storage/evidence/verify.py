"""Verification of stored rows: the audit chains, the MACs of the registry and of messages, and the payloads.

Only reads, a row at a time, in the caller's transaction. It detects rows that were edited, inserted, reordered, or
deleted before the end of a chain, and a missing chain that a later one follows.

Must not claim more: the last rows of a chain that no later chain follows can be deleted without a trace, with their
messages, unless something outside of the database has collected the heads. A registry row can be set back to an earlier
state, or deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, Select, Table, and_, func, select

from receiver.errors import IntegrityError, UnknownKey
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import COLUMNS, KeyedDigests, RowMacs

_AT_ONCE: Final = 1_000
_BODIES_AT_ONCE: Final = 8  # of up to 40 MB each

# Every table whose rows are signed one by one.
_SIGNED: Final = [schema.metadata.tables[name] for name in COLUMNS if name != "audit_events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationResult:
    """The result: the number of `rows` read, of `writers` of audit rows, and the first row that fails, if any.

    `first_bad` names the row and the reason, but nothing of its content.
    """

    rows: int
    writers: int
    first_bad: str | None


class _FailedRow(Exception):
    """A row that fails verification."""


def verify(connection: Connection, keyring: Keyring, *, payloads: bool = False) -> VerificationResult:
    """Verify everything, up to the first failure. With `payloads`, also open each body, which reads all of them.

    A missing payload is not a failure: payloads are purged. Other processes may write meanwhile.
    """
    examination = _Examination(connection, keyring)
    try:
        examination.chains()
        examination.recorded()
        for table in _SIGNED:
            examination.signed(table)
        if payloads:
            examination.bodies()
    except _FailedRow as exc:
        return VerificationResult(rows=examination.rows, writers=examination.writers, first_bad=str(exc))
    return VerificationResult(rows=examination.rows, writers=examination.writers, first_bad=None)


class _Examination:
    """One verification of the tables. Counts the rows read."""

    def __init__(self, connection: Connection, keyring: Keyring) -> None:
        self._connection = connection
        self._keyring = keyring
        self._macs = RowMacs(keyring)
        self.rows = 0
        self.writers = 0

    def chains(self) -> None:
        """Check each writer's rows: numbered from 1, each signed over the previous one."""
        table = schema.audit_events
        before: RowMapping | None = None
        for row in self._stream(select(table).order_by(table.c.writer, table.c.n, table.c.id)):
            if before is None or before["writer"] != row["writer"]:
                before = None
                self.writers += 1
            expected = 1 if before is None else before["n"] + 1
            if row["n"] > expected:
                raise _FailedRow(f"{_audit(row, expected)}: deleted; the next one is n {row['n']}, id {row['id']}")
            if row["n"] < expected:
                raise _FailedRow(f"{_audit(row, row['n'])}, id {row['id']}: inserted; that number exists already")
            failure = self._failure("audit_events", row, self._followed(row) if before is None else before["mac"])
            if failure is not None:
                why = "reordered" if self._reordered(row) else failure
                raise _FailedRow(f"{_audit(row, row['n'])}, id {row['id']}: {why}")
            before = row

    def _followed(self, row: RowMapping) -> bytes:
        """Return the MAC of the row that a writer's first row follows: often another writer's last."""
        if row["follows"] is None:
            return b""
        table = schema.audit_events
        followed: bytes | None = self._connection.scalar(select(table.c.mac).where(table.c.id == row["follows"]))
        if followed is None:
            raise _FailedRow(
                f"audit_events id {row['follows']}: deleted; the chain of writer {row['writer']} follows it"
            )
        return followed

    def _reordered(self, row: RowMapping) -> bool:
        """Return whether the row's rank by id among its writer's rows differs from its number."""
        table = schema.audit_events
        place = self._connection.scalar(
            select(func.count()).where(table.c.writer == row["writer"], table.c.id <= row["id"])
        )
        return bool(place != row["n"])

    def recorded(self) -> None:
        """Check that each audited message exists, and that each message is audited: both are kept forever."""
        events, messages = schema.audit_events, schema.messages
        gone = self._connection.execute(
            select(events.c.message_uuid, events.c.writer, events.c.n)
            .where(
                events.c.action == "message.receive",
                events.c.outcome != "duplicate",
                ~select(messages.c.uuid).where(messages.c.uuid == events.c.message_uuid).exists(),
            )
            .order_by(events.c.id)
            .limit(1)
        ).one_or_none()
        if gone is not None:
            raise _FailedRow(
                f"messages uuid {gone.message_uuid}: deleted; its recording is audited by writer {gone.writer}, "
                f"n {gone.n}"
            )
        number = self._connection.scalar(
            select(messages.c.id)
            .where(
                ~select(events.c.id)
                .where(
                    events.c.message_uuid == messages.c.uuid,
                    events.c.action == "message.receive",
                    events.c.outcome != "duplicate",
                )
                .exists()
            )
            .order_by(messages.c.id)
            .limit(1)
        )
        if number is not None:
            raise _FailedRow(f"messages id {number}: no audit row says that it was recorded; that row was deleted")

    def signed(self, table: Table) -> None:
        """Check each row's MAC."""
        for row in self._stream(select(table).order_by(table.c.id)):
            failure = self._failure(table.name, row)
            if failure is not None:
                raise _FailedRow(f"{table.name} id {row['id']}: {failure}")

    def bodies(self) -> None:
        """Check that each payload opens, and has its message's digest and size."""
        payloads, messages = schema.payloads, schema.messages
        seals, digests = Sealer(self._keyring), KeyedDigests(self._keyring)
        for row in self._stream(
            select(payloads, messages.c.uuid, messages.c.digest, messages.c.size)
            .outerjoin(
                messages, and_(messages.c.id == payloads.c.message_id, messages.c.received_at == payloads.c.received_at)
            )
            .order_by(payloads.c.message_id),
            at_once=_BODIES_AT_ONCE,
        ):
            if row["uuid"] is None:
                raise _FailedRow(f"payloads message_id {row['message_id']}: there is no such message")
            try:
                body = seals.open_body(row["payload_key"], row["sealed"], payload_binding(str(row["uuid"])))
            except IntegrityError as exc:
                raise _FailedRow(f"payloads message_id {row['message_id']}: {exc}") from exc
            if digests.content(body) != row["digest"] or len(body) != row["size"]:
                raise _FailedRow(f"payloads message_id {row['message_id']}: does not match the message's digest")

    def _stream(self, query: Select[Any], *, at_once: int = _AT_ONCE) -> Iterator[RowMapping]:
        """Yield the rows through a server-side cursor: only a few are in memory."""
        with self._connection.execute(query.execution_options(yield_per=at_once)) as rows:
            for row in rows.mappings():
                self.rows += 1
                yield row

    def _failure(self, table: str, row: RowMapping, previous: bytes = b"") -> str | None:
        """Return why the row's MAC fails; None when it verifies."""
        try:
            if self._macs.hold(table, {**row}, previous=previous):
                return None
        except UnknownKey:
            return f"signed with key {row['mac_key']}, which this keyring lacks"
        return "edited, or inserted without the key"


def _audit(row: RowMapping, n: int) -> str:
    return f"audit_events writer {row['writer']}, n {n}"
