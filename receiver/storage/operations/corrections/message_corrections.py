"""Corrections of messages: replay them; release quarantined ones, or discard them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, func, insert, select, update

from receiver.keyring import Keyring
from receiver.protocol.registry import Destination
from receiver.states import MessageState
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditEvent, write
from receiver.storage.operations.corrections.batches import (
    AuditedCorrections,
    CorrectionBatch,
    CorrectionTask,
    LeftUnchanged,
    count_newer,
)
from receiver.storage.operations.corrections.message_decisions import (
    REPLAYABLE,
    MessageDecision,
    MessageDecisions,
    unproved,
)
from receiver.storage.operations.queries import MessageFilter
from receiver.storage.registry import loader

# How many messages one transaction changes: their bodies are opened one by one.
BODIES: Final = 50

_Decide = Callable[[Connection, Mapping[str, Any], Destination], MessageDecision]
_CarryOut = Callable[[Connection, MessageDecision], AuditEvent]


class MessageCorrections(AuditedCorrections):
    """The corrections of messages."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        super().__init__(engine, keyring, actor=actor)
        self._decisions = MessageDecisions(keyring, self._sealer)

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

        def carry_out(connection: Connection, decision: MessageDecision) -> AuditEvent:
            made = _create_deliveries(connection, decision)
            _update_message(connection, decision, state=MessageState.ACCEPTED)
            return self._message_event(
                "message.replay", MessageState.ACCEPTED, now, decision, reason, {"deliveries": made}
            )

        decide = partial(self._decisions.replay, handler=handler)
        return self._correct(where, REPLAYABLE, decide, carry_out, after=after, dry_run=dry_run)

    def release(self, where: MessageFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Check quarantined messages again, against the current registry, and deliver those that pass.

        The others stay, with their current reason. Raises NotFound.
        """

        def carry_out(connection: Connection, decision: MessageDecision) -> AuditEvent:
            made = _create_deliveries(connection, decision)
            state = MessageState.ACCEPTED if made else MessageState.UNHANDLED
            _update_message(connection, decision, state=state, quarantine_reason=None)
            return self._message_event(
                "message.release",
                state,
                now,
                decision,
                reason,
                {"was": decision.row["quarantine_reason"], "kind": decision.kind, "deliveries": made},
            )

        return self._correct(where, (MessageState.QUARANTINED,), self._decisions.release, carry_out, dry_run=dry_run)

    def discard(self, where: MessageFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Discard quarantined messages. Their rows and their bytes stay. Raises NotFound."""

        def carry_out(connection: Connection, decision: MessageDecision) -> AuditEvent:
            _update_message(connection, decision, state=MessageState.DISCARDED)
            was = {"was": decision.row["quarantine_reason"]}
            return self._message_event("message.discard", MessageState.DISCARDED, now, decision, reason, was)

        return self._correct(where, (MessageState.QUARANTINED,), self._decisions.discard, carry_out, dry_run=dry_run)

    def _correct(
        self,
        where: MessageFilter,
        states: Collection[MessageState],
        decide: _Decide,
        carry_out: _CarryOut,
        *,
        after: int = 0,
        dry_run: bool,
    ) -> CorrectionTask:
        def step(
            chosen: list[ColumnElement[bool]], connection: Connection, after: int, seen: Collection[str]
        ) -> CorrectionBatch | None:
            rows = _locked(connection, chosen, after)
            return self._correct_batch(connection, rows, decide, carry_out, seen) if rows else None

        return self._task(schema.messages, where, states, step, after=after, dry_run=dry_run)

    def _correct_batch(
        self,
        connection: Connection,
        rows: list[dict[str, Any]],
        decide: _Decide,
        carry_out: _CarryOut,
        seen: Collection[str],
    ) -> CorrectionBatch:
        known = {each.id: each for each in loader.load_registry(connection, self._keyring).destinations.values()}
        decisions = [
            decide(connection, row, known[row["destination_id"]]) if row["destination_id"] in known else unproved(row)
            for row in rows
        ]
        oldest: dict[str, int] = {}
        for decision in decisions:
            for new in decision.new:
                oldest.setdefault(new.lane, decision.row["id"])
        newer = count_newer(connection, oldest, seen)
        done = [decision for decision in decisions if decision.why is None]
        write(connection, self._audit, [carry_out(connection, decision) for decision in done])
        for decision in decisions:
            if decision.reason is not None:
                _update_message(connection, decision, quarantine_reason=decision.reason)
        return CorrectionBatch(
            done=tuple(each.row["id"] for each in done),
            last=rows[-1]["id"],
            left=tuple(LeftUnchanged(id=each.row["id"], why=each.why) for each in decisions if each.why),
            made=sum(len(each.new) for each in done),
            lanes=tuple(oldest),
            newer=newer,
        )

    def _message_event(
        self, action: str, outcome: str, now: datetime, decision: MessageDecision, reason: str, detail: dict[str, Any]
    ) -> AuditEvent:
        return self._event(
            action,
            outcome,
            now,
            reason,
            subject=f"messages:{decision.row['id']}",
            destination=decision.destination,
            message_uuid=decision.row["uuid"],
            detail=detail,
        )


def _locked(connection: Connection, chosen: list[ColumnElement[bool]], after: int) -> list[dict[str, Any]]:
    """Lock and return the next messages."""
    table = schema.messages
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
        )
        .where(*chosen, table.c.id > after)
        .order_by(table.c.id)
        .limit(BODIES)
        .with_for_update()
    ).mappings()
    return [dict(row) for row in found]


def _update_message(connection: Connection, decision: MessageDecision, **values: str | None) -> None:
    table = schema.messages
    connection.execute(update(table).where(table.c.id == decision.row["id"]).values(**values))


def _create_deliveries(connection: Connection, decision: MessageDecision) -> list[int]:
    """Create the new deliveries one by one: their ids give the order of running. Returns their ids."""
    table, message_id = schema.deliveries, decision.row["id"]
    made = []
    for new in decision.new:
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
                        received_at=decision.row["received_at"],
                        destination_id=decision.row["destination_id"],
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
