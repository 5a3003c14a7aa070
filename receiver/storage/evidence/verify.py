"""Verification of stored rows: the seals, the audit chains, the MACs of the registry and of messages, the payloads.

Only reads, a row at a time, in the caller's transaction. It detects rows that were edited, inserted, reordered or
deleted, in a chain or after they were sealed, a registry that changed without a recorded change, a delivery that is
marked as succeeded and was not run, and a log that does not extend a checkpoint that was kept elsewhere.

Must not claim more: without such a checkpoint, the newest seals can be deleted without a trace together with all that
they seal; rows that are not sealed yet, together with their messages.
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
from receiver.storage.evidence.verify_outcomes import failed_outcome
from receiver.storage.evidence.verify_seals import BadSeal, SealedRowReader, SealedTree

_AT_ONCE: Final = 1_000
_BODIES_AT_ONCE: Final = 8  # of up to 40 MB each

# Every table whose rows are signed one by one.
_SIGNED: Final = [schema.metadata.tables[name] for name in COLUMNS if name != "audit_events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationResult:
    """The result: the number of `rows` read, of `writers` of audit rows, and the first row that fails, if any.

    `seals`: how many seals there are, and `sealed` the number of audit rows that they cover. `first_bad` names the row
    and the reason, but nothing of its content.
    """

    rows: int
    writers: int
    first_bad: str | None
    seals: int = 0
    sealed: int = 0


class _FailedRow(Exception):
    """A row that fails verification."""


def verify(
    connection: Connection, keyring: Keyring, *, payloads: bool = False, checkpoint: str | None = None
) -> VerificationResult:
    """Verify everything, up to the first failure. With `payloads`, also open each body, which reads all of them.

    `checkpoint`: one that was kept elsewhere, which the log must extend. A missing payload is not a failure: payloads
    are purged. Other processes may write meanwhile. Raises ProofInvalid when the checkpoint is not one of this log's.
    """
    examination, tree = _Examination(connection, keyring), SealedTree(connection, keyring)
    first_bad = None
    try:
        tree.prove()
        if checkpoint is not None:
            tree.extends(checkpoint)
        examination.chains(tree.expectation())
        examination.recorded()
        for table in _SIGNED:
            examination.signed(table)
        examination.outcomes()
        tree.registry()
        if payloads:
            examination.bodies()
    except (_FailedRow, BadSeal) as exc:
        first_bad = str(exc)
    return VerificationResult(
        rows=examination.rows, writers=examination.writers, first_bad=first_bad, seals=tree.seals, sealed=tree.size
    )


class _Examination:
    """One verification of the tables. Counts the rows read."""

    def __init__(self, connection: Connection, keyring: Keyring) -> None:
        self._connection = connection
        self._keyring = keyring
        self._macs = RowMacs(keyring)
        self.rows = 0
        self.writers = 0

    def chains(self, sealed: SealedRowReader) -> None:
        """Check each writer's rows: numbered from 1, each signed over the previous one, and as they were sealed."""
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
            sealed.row(row["writer"], row["n"], bytes(row["mac"]))
            before = row
        sealed.end()

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

    def outcomes(self) -> None:
        """Check the outcomes of deliveries against the audit."""
        failure = failed_outcome(self._connection)
        if failure is not None:
            raise _FailedRow(failure)

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
