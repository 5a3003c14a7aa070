"""Corrections: retry or skip deliveries; replay, release or discard messages.

Must not run deliveries, nor decide whether a correction is wise: the caller gives a reason, which is sealed in one
audit row for each delivery, message or lane changed.

Work is done in batches, one transaction each. After an interruption, the reported batches are done, and the command can
be run again. A dry run does the same and rolls it back, so that its report is exact. A batch whose locks conflict with
running work is retried. A delivery that a worker runs under a live lease is left alone; later starts wait for the
COMMIT, because starting locks the delivery's row. Workers find the new work by themselves, within a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Engine, Table, and_, func, insert, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DataError, DBAPIError

from receiver.database.engine import sqlstate
from receiver.errors import Conflict, IntegrityError, NotFound, UnknownSource, Unreadable
from receiver.keyring import Keyring
from receiver.protocol import sources
from receiver.protocol.message import ParsedMessage
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination
from receiver.storage import schema
from receiver.storage.accept.fan_out import NewDelivery, deliveries, unordered
from receiver.storage.accept.message_builder import UNSTORABLE
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import PatientDigests, mac_key, row_mac
from receiver.storage.operations import queries
from receiver.storage.operations.queries import DeliveryFilter, MessageFilter
from receiver.storage.registry import loader

# The batch sizes: for rows that are only updated, and for messages whose bodies are opened one by one.
ROWS: Final = 500
BODIES: Final = 50

Chosen = list[ColumnElement[bool]]

_RETRIABLE: Final = frozenset({"40001", "40P01"})
_ATTEMPTS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftUnchanged:
    """A message or delivery that was not changed, and why not."""

    id: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionBatch:
    """The result of one transaction, or in a dry run its would-be result.

    `done`: ids of the deliveries or messages; `last`: the highest id looked at. `made`: number of new deliveries.
    `lanes`: lanes where a delivery may run now. `newer`: number of newer messages already handled in those of the lanes
    that are ordered and that no earlier batch named.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """The change that an operation makes to a delivery, and the states that it cannot change."""

    action: str
    values: Mapping[str, Any]
    default: tuple[str, ...]
    refused: Mapping[str, str]


_RETRY: Final = _Change(
    action="delivery.retry",
    default=("dead",),
    # No request waits any more for a delivery that ran inline (acknowledge="after_handling").
    values={
        "state": "pending",
        "attempts": 0,
        "started_at": None,
        "ready_at": None,
        "deferred_since": None,
        "finished_at": None,
        "inline": False,
    },
    refused={"succeeded": "succeeded already: `messages replay` delivers its message again"},
)
_SKIP: Final = _Change(
    action="delivery.skip",
    default=("pending", "dead"),
    values={"state": "skipped", "started_at": None, "ready_at": None},
    refused={"succeeded": "succeeded already", "skipped": "skipped already"},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decision:
    """The decision about a message: `new` deliveries of its `kind`; or nothing, and `why`.

    `reason`: why it stays in quarantine.
    """

    row: Mapping[str, Any]
    destination: str
    kind: str | None = None
    new: tuple[NewDelivery, ...] = ()
    why: str | None = None
    reason: str | None = None


_STATES: Final = {
    "quarantined": "is in quarantine: see `redox-receiver messages release`",
    "discarded": "was discarded",
    "accepted": "is not in quarantine",
    "unhandled": "is not in quarantine",
}


_UNPROVED: Final = "its destination's row was changed by something else: run `redox-receiver audit verify`"


class Corrections:
    """The correction operations. `actor`: the name in the audit log (USER@HOST)."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._keyring = keyring
        self._seals = Sealer(keyring)
        self._digests = PatientDigests(keyring)
        self._audit = AuditChain(keyring, self._seals)
        self._actor = actor
        self._key = keyring.current("mac")

    # --- deliveries and lanes

    def retry(self, where: DeliveryFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Run deliveries again, at their place in the lane, with their idempotency key and a new set of attempts.

        Named by id, they may be dead, skipped, or pending (and then no longer wait). Otherwise they are dead, unless
        `where.state` is given. Raises NotFound.
        """
        return self._deliveries(where, _RETRY, now, reason, dry_run)

    def skip(self, where: DeliveryFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Skip pending or dead deliveries: their lane continues, even a held one. Raises NotFound."""
        return self._deliveries(where, _SKIP, now, reason, dry_run)

    def release_lane(self, name: str, now: datetime, *, reason: str | None) -> None:
        """Release a held lane: its first delivery runs once more. Raises NotFound, and Conflict when it is not held."""
        table = schema.lanes
        with self._transaction() as connection:
            row = connection.execute(
                select(table.c.state, schema.destinations.c.name)
                .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
                .where(table.c.lane == name)
                .with_for_update(of=table)
            ).one_or_none()
            if row is None:
                raise NotFound(f"no lane {name!r} ever ran: see `redox-receiver lanes list`")
            if row.state != "held":
                raise Conflict(f"lane {name} is not held but {row.state}: see `redox-receiver lanes list`")
            connection.execute(update(table).where(table.c.lane == name).values(state="ready", ready_at=None))
            write(
                connection,
                self._audit,
                [
                    AuditEvent(
                        action="lane.release",
                        outcome="ready",
                        at=now,
                        actor=self._actor,
                        destination=row.name,
                        subject=f"lanes:{name}",
                        note=reason,
                    )
                ],
            )

    def _deliveries(
        self, where: DeliveryFilter, change: _Change, now: datetime, reason: str, dry_run: bool
    ) -> CorrectionTask:
        table = schema.deliveries

        def step(chosen: Chosen, connection: Connection, after: int, seen: Collection[str]) -> CorrectionBatch | None:
            ids = connection.scalars(
                select(table.c.id).where(*chosen, table.c.id > after).order_by(table.c.id).limit(ROWS)
            ).all()
            return self._change_deliveries(connection, ids, change, now, reason, seen) if ids else None

        return self._work(table, where, change.default, step, 0, dry_run)

    def _change_deliveries(
        self,
        connection: Connection,
        ids: Sequence[int],
        change: _Change,
        now: datetime,
        reason: str,
        seen: Collection[str],
    ) -> CorrectionBatch:
        table, lane, came = schema.deliveries, schema.lanes, schema.messages
        rows = connection.execute(
            select(
                table.c.id,
                table.c.message_id,
                table.c.generation,
                table.c.lane,
                table.c.state,
                table.c.epoch,
                table.c.started_at,
                table.c.error_class,
                came.c.uuid,
                schema.destinations.c.name.label("destination"),
            )
            .join(came, came.c.id == table.c.message_id)
            .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
            .where(table.c.id.in_(ids))
            .order_by(table.c.id)
            .with_for_update(of=table)
        ).all()
        # Read after the rows are locked, so that everything begun before is seen. A lane without a row has never run.
        lanes = {
            row.lane: row
            for row in connection.execute(
                select(lane.c.lane, lane.c.epoch, queries.leased().label("leased")).where(
                    lane.c.lane.in_({row.lane for row in rows})
                )
            )
        }
        left, done = [], []
        for row in rows:
            why = change.refused.get(row.state) or _running(row, lanes.get(row.lane))
            if why is None:
                done.append(row)
            else:
                left.append(LeftUnchanged(id=row.id, why=why))
        oldest: dict[str, int] = {}
        for row in done:
            oldest[row.lane] = min(row.message_id, oldest.get(row.lane, row.message_id))
        newer = _newer(connection, oldest, seen)
        values = dict(change.values) | ({"finished_at": now} if change is _SKIP else {})
        connection.execute(update(table).where(table.c.id.in_([row.id for row in done])).values(values))
        _wake_stopped(connection, done)
        write(
            connection,
            self._audit,
            [
                AuditEvent(
                    action=change.action,
                    outcome=change.values["state"],
                    at=now,
                    actor=self._actor,
                    destination=row.destination,
                    message_uuid=row.uuid,
                    subject=f"deliveries:{row.id}",
                    note=reason,
                    detail={"was": row.state, "error_class": row.error_class, "generation": row.generation},
                )
                for row in done
            ],
        )
        return CorrectionBatch(
            done=tuple(row.id for row in done), left=tuple(left), last=ids[-1], lanes=tuple(oldest), newer=newer
        )

    # --- messages

    def replay(
        self,
        where: MessageFilter,
        now: datetime,
        *,
        handler: str | None = None,
        reason: str,
        dry_run: bool = False,
        after: int = 0,
    ) -> CorrectionTask:
        """Deliver messages again, in the order of their arrival, to the handlers (or `handler`) that are enabled now.

        New deliveries are added at the end of their lanes, with a new generation and another idempotency key. A message
        whose last delivery is still pending is left. `after`: only messages with a higher id, to continue an earlier
        run. Raises NotFound.
        """

        def judge(connection: Connection, row: Mapping[str, Any], destination: Destination) -> _Decision:
            return self._judge_replay(connection, row, destination, handler)

        def carry_out(connection: Connection, verdict: _Decision) -> AuditEvent:
            made = self._dispatch(connection, verdict)
            table = schema.messages
            connection.execute(update(table).where(table.c.id == verdict.row["id"]).values(state="accepted"))
            return self._event("message.replay", "accepted", now, verdict, reason, {"deliveries": made})

        return self._messages(where, ("accepted", "unhandled"), judge, carry_out, dry_run, after)

    def release(self, where: MessageFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Check quarantined messages again, against the current registry, and deliver those that pass.

        The others stay, with their current reason. Raises NotFound.
        """

        def carry_out(connection: Connection, verdict: _Decision) -> AuditEvent:
            made = self._dispatch(connection, verdict)
            state, table = "accepted" if made else "unhandled", schema.messages
            connection.execute(
                update(table).where(table.c.id == verdict.row["id"]).values(state=state, quarantine_reason=None)
            )
            return self._event(
                "message.release",
                state,
                now,
                verdict,
                reason,
                {"was": verdict.row["quarantine_reason"], "kind": verdict.kind, "deliveries": made},
            )

        return self._messages(where, ("quarantined",), self._judge_release, carry_out, dry_run)

    def discard(self, where: MessageFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Discard quarantined messages. Their rows and their bytes stay. Raises NotFound."""

        def judge(_connection: Connection, row: Mapping[str, Any], destination: Destination) -> _Decision:
            why = None if row["state"] == "quarantined" else _STATES[row["state"]]
            return _Decision(row=row, destination=destination.name, why=why)

        def carry_out(connection: Connection, verdict: _Decision) -> AuditEvent:
            table = schema.messages
            connection.execute(update(table).where(table.c.id == verdict.row["id"]).values(state="discarded"))
            return self._event(
                "message.discard", "discarded", now, verdict, reason, {"was": verdict.row["quarantine_reason"]}
            )

        return self._messages(where, ("quarantined",), judge, carry_out, dry_run)

    def _messages(
        self,
        where: MessageFilter,
        states: Sequence[str],
        judge: Callable[[Connection, Mapping[str, Any], Destination], _Decision],
        carry_out: Callable[[Connection, _Decision], AuditEvent],
        dry_run: bool,
        after: int = 0,
    ) -> CorrectionTask:
        table = schema.messages

        def step(chosen: Chosen, connection: Connection, after: int, seen: Collection[str]) -> CorrectionBatch | None:
            found = connection.execute(
                select(
                    table.c.id,
                    table.c.uuid,
                    table.c.destination_id,
                    table.c.state,
                    table.c.quarantine_reason,
                    table.c.kind,
                    table.c.query,
                    table.c.received_at,
                    table.c.sha256,
                )
                .where(*chosen, table.c.id > after)
                .order_by(table.c.id)
                .limit(BODIES)
                .with_for_update()
            ).mappings()
            rows = [dict(row) for row in found]
            if not rows:
                return None
            known = {each.id: each for each in loader.load_registry(connection, self._keyring).destinations.values()}
            verdicts = [
                judge(connection, row, known[row["destination_id"]])
                if row["destination_id"] in known
                else _Decision(row=row, destination="", why=_UNPROVED)
                for row in rows
            ]
            oldest: dict[str, int] = {}
            for verdict in verdicts:
                for new in verdict.new:
                    oldest.setdefault(new.lane, verdict.row["id"])
            newer = _newer(connection, oldest, seen)
            done = [verdict for verdict in verdicts if verdict.why is None]
            write(connection, self._audit, [carry_out(connection, verdict) for verdict in done])
            for verdict in verdicts:
                if verdict.reason is not None:
                    connection.execute(
                        update(table).where(table.c.id == verdict.row["id"]).values(quarantine_reason=verdict.reason)
                    )
            return CorrectionBatch(
                done=tuple(each.row["id"] for each in done),
                last=rows[-1]["id"],
                left=tuple(LeftUnchanged(id=each.row["id"], why=each.why) for each in verdicts if each.why),
                made=sum(len(each.new) for each in done),
                lanes=tuple(oldest),
                newer=newer,
            )

        return self._work(table, where, states, step, after, dry_run)

    def _judge_replay(
        self, connection: Connection, row: Mapping[str, Any], destination: Destination, handler: str | None
    ) -> _Decision:
        left = partial(_Decision, row=row, destination=destination.name)
        if row["state"] not in ("accepted", "unhandled"):
            return left(why=_STATES[row["state"]])
        if row["query"]:
            return left(why="is a query: its sender no longer waits")
        try:
            message = self._read(connection, row)
        except (Conflict, IntegrityError) as exc:
            return left(why=str(exc))
        except Unreadable as exc:
            return left(why=f"cannot be read any more: {exc.reason}")
        new = [each for each in deliveries(message, destination, self._digests) if handler in (None, each.handler)]
        if not new:
            return left(
                why=f"no enabled handler takes {message.kind}"
                if handler is None
                else f"{handler} is not enabled, or does not take {message.kind}"
            )
        table = schema.deliveries
        waiting = set(
            connection.scalars(
                select(table.c.handler).where(table.c.message_id == row["id"], table.c.state == "pending")
            )
        )
        new = [each for each in new if each.handler not in waiting]
        if not new:
            return left(why="is pending already")
        return left(kind=message.kind, new=tuple(new))

    def _judge_release(self, connection: Connection, row: Mapping[str, Any], destination: Destination) -> _Decision:
        left = partial(_Decision, row=row, destination=destination.name)
        if row["state"] != "quarantined":
            return left(why=_STATES[row["state"]])
        if row["query"]:
            return left(why="is a query: its sender no longer waits; discard it")
        try:
            message = self._read(connection, row)
            reason = sources.admit(message, destination)
            if reason is None and not self._claim_key(connection, row, message):
                return left(why="was received again as another message: discard this one")
            if reason is None and row["kind"] is None and not self._fill(connection, row["id"], message):
                reason = UNSTORABLE
        except (Conflict, IntegrityError) as exc:
            return left(why=str(exc))
        except (Unreadable, UnknownSource) as exc:
            return left(why=f"stays in quarantine: {exc.reason}", reason=exc.reason)
        if reason is not None:
            return left(why=f"stays in quarantine: {reason}", reason=reason)
        return left(kind=message.kind, new=tuple(deliveries(message, destination, self._digests)))

    def _read(self, connection: Connection, row: Mapping[str, Any]) -> ParsedMessage:
        """Return the message in the stored bytes. Raises Unreadable, IntegrityError, or Conflict (purged)."""
        body = queries.payload(connection, self._seals, row)
        if body is None:
            raise Conflict("its payload is purged: nothing is left to deliver")
        return read(body)

    def _claim_key(self, connection: Connection, row: Mapping[str, Any], message: ParsedMessage) -> bool:
        """Claim the key that repeats of the message will have. Returns False when another message has it.

        Until it was read, its key was the digest of its bytes.
        """
        if message.key_expires:
            return True
        table = schema.message_keys
        key = {"destination_id": row["destination_id"], "key": message.key, "outside": message.outside}
        connection.execute(upsert(table).values(**key, message_id=row["id"]).on_conflict_do_nothing())
        return bool(connection.scalar(select(table.c.message_id).filter_by(**key)) == row["id"])

    def _fill(self, connection: Connection, number: int, message: ParsedMessage) -> bool:
        """Fill the metadata columns of a message that was unreadable on arrival, sign its row, and queue its patients.

        Handlers receive these columns. Returns False when the database refuses them. Raises IntegrityError when the
        row's MAC fails.
        """
        table = schema.messages
        row = dict(connection.execute(select(table).where(table.c.id == number)).mappings().one())
        if row_mac(mac_key(self._keyring[row["mac_key"]]), table.name, row) != row["mac"]:
            raise IntegrityError("its row was changed by something else: run `redox-receiver audit verify`")
        filled = {name: getattr(message, name) for name in ParsedMessage.__struct_fields__ if name in table.c}
        try:
            with connection.begin_nested():
                connection.execute(
                    update(table)
                    .where(table.c.id == number)
                    .values(
                        **filled,
                        mac=row_mac(mac_key(self._key), table.name, row | filled),
                        mac_key=self._key.id,
                        patients_indexed_at=None,
                    )
                )
        except DataError:
            return False
        return True

    def _dispatch(self, connection: Connection, verdict: _Decision) -> list[int]:
        """Create the new deliveries one by one: their ids give the order of running. Returns their ids."""
        table, message_id = schema.deliveries, verdict.row["id"]
        made = []
        for new in verdict.new:
            last = (
                select(func.coalesce(func.max(table.c.generation), 0))
                .where(table.c.message_id == message_id, table.c.handler == new.handler)
                .scalar_subquery()
            )
            # No request waits for an answer now, so that none of them is `inline`.
            made.append(
                int(
                    connection.execute(
                        insert(table)
                        .values(
                            message_id=message_id,
                            destination_id=verdict.row["destination_id"],
                            handler=new.handler,
                            lane=new.lane,
                            inline=False,
                            generation=last + 1,
                        )
                        .returning(table.c.id)
                    ).scalar_one()
                )
            )
        return made

    def _event(
        self, action: str, outcome: str, now: datetime, verdict: _Decision, reason: str, detail: dict[str, Any]
    ) -> AuditEvent:
        return AuditEvent(
            action=action,
            outcome=outcome,
            at=now,
            actor=self._actor,
            destination=verdict.destination,
            message_uuid=verdict.row["uuid"],
            subject=f"messages:{verdict.row['id']}",
            note=reason,
            detail=detail,
        )

    # --- batches

    def _work(
        self,
        table: Table,
        where: DeliveryFilter | MessageFilter,
        states: Sequence[str],
        step: Callable[..., CorrectionBatch | None],
        after: int,
        dry_run: bool,
    ) -> CorrectionTask:
        """Return the rows of `where`: by id, in any state; otherwise in one of `states`, unless a state is given."""
        with self._engine.connect() as connection:
            _all_there(connection, table, where.ids)
            chosen = where.clauses(connection)
            if not where.ids and where.state is None:
                chosen.append(table.c.state.in_(states))
            total = connection.scalar(select(func.count()).select_from(table).where(*chosen, table.c.id > after))
        return CorrectionTask(total=total or 0, batches=self._batches(partial(step, chosen), after, dry_run))

    def _batches(
        self, step: Callable[..., CorrectionBatch | None], after: int, dry_run: bool
    ) -> Iterator[CorrectionBatch]:
        seen: set[str] = set()
        while (batch := self._with_retries(partial(step, after=after, seen=seen), dry_run)) is not None:
            yield batch
            seen.update(batch.lanes)
            after = batch.last

    def _with_retries(self, step: Callable[..., CorrectionBatch | None], dry_run: bool) -> CorrectionBatch | None:
        for attempt in range(_ATTEMPTS):
            try:
                with self._transaction(dry_run) as connection:
                    return step(connection)
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


def _all_there(connection: Connection, table: Table, ids: Collection[int | UUID]) -> None:
    """Raise NotFound when one of the ids or uuids does not exist."""
    for column, kind in (("id", int), ("uuid", UUID)):
        asked = {each for each in ids if isinstance(each, kind)}
        if asked:
            asked -= set(connection.scalars(select(table.c[column]).where(table.c[column].in_(asked))))
        if asked:
            raise NotFound(f"there is no {min(asked)} in {table.name}: see `redox-receiver {table.name} list`")


def _running(row: Any, lane: Any) -> str | None:
    """Return why the delivery cannot be changed: a worker runs it, under the lease of this epoch."""
    if row.state == "pending" and row.started_at is not None and lane and lane.leased and lane.epoch == row.epoch:
        return f"is running now, in lane {lane.lane}: try again when it has ended"
    return None


def _wake_stopped(connection: Connection, rows: Sequence[Any]) -> None:
    """Wake the lanes that stopped at these deliveries: held under the epoch of one, or waiting for a time."""
    table = schema.lanes
    connection.execute(
        update(table)
        .where(
            ~queries.leased(),
            or_(
                and_(table.c.state == "waiting", table.c.lane.in_({row.lane for row in rows})),
                and_(
                    table.c.state == "held",
                    tuple_(table.c.lane, table.c.epoch).in_(
                        {(row.lane, row.epoch) for row in rows if row.epoch is not None}
                    ),
                ),
            ),
        )
        .values(state="ready", ready_at=None)
    )


def _newer(connection: Connection, oldest: Mapping[str, int], seen: Collection[str]) -> int:
    """Return how many messages newer than `oldest` (lane → message id) are already handled, in lanes not in `seen`."""
    ordered = {lane: message_id for lane, message_id in oldest.items() if lane not in seen and not unordered(lane)}
    if not ordered:
        return 0
    return int(
        connection.execute(
            text(
                "SELECT count(DISTINCT (d.lane, d.message_id)) FROM deliveries d "
                "JOIN unnest(CAST(:lanes AS text[]), CAST(:ids AS bigint[])) AS o(lane, id) ON d.lane = o.lane "
                "WHERE d.message_id > o.id AND d.message_id > :least AND d.state = 'succeeded'"
            ),
            {"lanes": list(ordered), "ids": list(ordered.values()), "least": min(ordered.values())},
        ).scalar_one()
    )
