"""Batches of corrections: the loop that every kind of correction of many rows shares.

Work is done in batches, one transaction each. After an interruption, the reported batches are done, and the command can
be run again. A dry run does the same and rolls it back, so that its report is exact. A batch whose locks conflict with
running work is retried. Workers find the new work by themselves, within a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Engine, Table, func, select, text
from sqlalchemy.exc import DBAPIError

from receiver.database.engine import sqlstate
from receiver.errors import NotFound
from receiver.keyring import Keyring
from receiver.states import DeliveryState
from receiver.storage.accept.fan_out import unordered
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations.queries import DeliveryFilter, MessageFilter

# How many rows one transaction updates, if it opens no bodies.
ROWS: Final = 500

# Changes the next rows after an id, in a transaction. Returns None when there are none. Arguments: the connection, the
# id, and the lanes that earlier batches named.
Step = Callable[[Connection, int, Collection[str]], "CorrectionBatch | None"]
# The same for the rows that fulfill these conditions.
ChosenStep = Callable[[list[ColumnElement[bool]], Connection, int, Collection[str]], "CorrectionBatch | None"]

_RETRIABLE: Final = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
_ATTEMPTS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftUnchanged:
    """A row that was not changed, and why not."""

    id: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionBatch:
    """The result of one transaction, or in a dry run its would-be result.

    `done`: ids of the changed rows; `last`: the highest id looked at. `made`: number of new deliveries. `lanes`: lanes
    where a delivery may run now. `newer`: number of newer messages already handled in those of the lanes that are
    ordered and that no earlier batch named.
    """

    done: tuple[int, ...]
    left: tuple[LeftUnchanged, ...]
    last: int
    made: int = 0
    lanes: tuple[str, ...] = ()
    newer: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionTask:
    """The requested work: `total` matching rows, and the batches. Each batch runs when it is iterated."""

    total: int
    batches: Iterator[CorrectionBatch]


class AuditedCorrections:
    """The base of all corrections. `actor`: the name in the audit log (USER@HOST)."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._keyring = keyring
        self._sealer = Sealer(keyring)
        self._audit = AuditChain(keyring, self._sealer)
        self._actor = actor

    def _event(
        self,
        action: str,
        outcome: str,
        now: datetime,
        reason: str | None,
        *,
        subject: str,
        destination: str | None,
        message_uuid: UUID | None = None,
        detail: dict[str, Any] | None = None,
    ) -> AuditEvent:
        return AuditEvent(
            action=action,
            outcome=outcome,
            at=now,
            actor=self._actor,
            destination=destination,
            message_uuid=message_uuid,
            subject=subject,
            note=reason,
            detail=detail,
        )

    def _task(
        self,
        table: Table,
        where: DeliveryFilter | MessageFilter,
        states: Collection[str],
        step: ChosenStep,
        *,
        after: int = 0,
        dry_run: bool,
    ) -> CorrectionTask:
        """Return the work on the rows of `where`: by id, in any state; otherwise in one of `states`, unless a state is
        given.
        """
        with self._engine.connect() as connection:
            _require_ids(connection, table, where.ids)
            chosen = where.clauses(connection)
            if not where.ids and where.state is None:
                chosen.append(table.c.state.in_(states))
            total = connection.scalar(select(func.count()).select_from(table).where(*chosen, table.c.id > after))
        return CorrectionTask(total=total or 0, batches=self._batches(partial(step, chosen), after, dry_run))

    def _batches(self, step: Step, after: int, dry_run: bool) -> Iterator[CorrectionBatch]:
        seen: set[str] = set()
        while (batch := self._with_retries(step, after, seen, dry_run)) is not None:
            yield batch
            seen.update(batch.lanes)
            after = batch.last

    def _with_retries(self, step: Step, after: int, seen: Collection[str], dry_run: bool) -> CorrectionBatch | None:
        for attempt in range(_ATTEMPTS):
            try:
                with self._transaction(dry_run) as connection:
                    return step(connection, after, seen)
            except DBAPIError as exc:
                if sqlstate(exc) not in _RETRIABLE or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt raises")

    @contextmanager
    def _transaction(self, dry_run: bool = False) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection, connection.begin() as transaction:
                yield connection
                if dry_run:
                    transaction.rollback()
                    self._audit.restart()
        except BaseException:
            self._audit.restart()
            raise


def count_newer(connection: Connection, oldest: Mapping[str, int], seen: Collection[str]) -> int:
    """Return how many messages newer than `oldest` (lane → message id) are already handled, in lanes not in `seen`."""
    ordered = {lane: message_id for lane, message_id in oldest.items() if lane not in seen and not unordered(lane)}
    if not ordered:
        return 0
    return int(
        connection.execute(
            text(
                "SELECT count(DISTINCT (d.lane, d.message_id)) FROM deliveries d "
                "JOIN unnest(CAST(:lanes AS text[]), CAST(:ids AS bigint[])) AS o(lane, id) ON d.lane = o.lane "
                f"WHERE d.message_id > o.id AND d.message_id > :least AND d.state = '{DeliveryState.SUCCEEDED}'"
            ),
            {"lanes": list(ordered), "ids": list(ordered.values()), "least": min(ordered.values())},
        ).scalar_one()
    )


def _require_ids(connection: Connection, table: Table, ids: Collection[int | UUID]) -> None:
    """Raise NotFound when one of the ids or uuids does not exist."""
    for column, kind in (("id", int), ("uuid", UUID)):
        missing = {each for each in ids if isinstance(each, kind)}
        if missing:
            missing -= set(connection.scalars(select(table.c[column]).where(table.c[column].in_(missing))))
        if missing:
            raise NotFound(f"there is no {min(missing)} in {table.name}: see `redox-receiver {table.name} list`")
