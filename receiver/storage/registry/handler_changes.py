"""Changes to subscriptions: handlers that are enabled at a destination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, select, update

from receiver.errors import Conflict, NotFound
from receiver.storage import schema
from receiver.storage.registry.transactions import RegistryTransactions

# The pause reason of a handler whose pending deliveries may have run since the restored backup.
RESTORED: Final = "restored"


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerSpec:
    """The declaration of a handler, as stored in `subscriptions`."""

    handler: str
    role: str
    patterns: tuple[str, ...]
    ordering: str
    patient_key: str | None
    acknowledge: str
    on_failure: str
    max_attempts: int
    timeout: float

    def columns(self) -> dict[str, Any]:
        """Return the columns of its row."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"patterns": list(self.patterns)}


class HandlerChanges(RegistryTransactions):
    """Operations that change subscriptions."""

    def enable_handler(self, destination: str, spec: HandlerSpec, now: datetime) -> int:
        """Bind a handler to a destination, or bind it again with its current declaration. Returns the subscription's
        id.

        Raises NotFound; Conflict if another responder answers the same query at that destination.
        """
        with self._change() as connection:
            owner = self._destination(connection, destination)
            rows = connection.execute(
                select(schema.subscriptions).where(schema.subscriptions.c.destination_id == owner.id)
            ).all()
            for row in rows:
                shared = sorted(set(row.patterns) & set(spec.patterns))
                if spec.role == row.role == "responder" and row.enabled and row.handler != spec.handler and shared:
                    raise Conflict(
                        f"{shared[0]} is answered by {row.handler} at {destination}: a query has one responder"
                    )
            found = next((row for row in rows if row.handler == spec.handler), None)
            values = spec.columns() | {"enabled": True}
            if found is None:
                number = self._insert(connection, schema.subscriptions, values | {"destination_id": owner.id})
            else:
                number = found.id
                self._update(connection, schema.subscriptions, found, values)
            self._add_event(
                connection,
                now,
                "handler.enable",
                destination,
                f"subscriptions:{number}",
                {"handler": spec.handler, "patterns": list(spec.patterns)},
            )
        return int(number)

    def disable_handler(self, destination: str, handler: str, now: datetime) -> None:
        """Unbind a handler: it gets no new deliveries; pending ones stay. Raises NotFound."""
        with self._change() as connection:
            row = self._subscription(connection, destination, handler)
            self._update(connection, schema.subscriptions, row, {"enabled": False})
            self._add_event(
                connection, now, "handler.disable", destination, f"subscriptions:{row.id}", {"handler": handler}
            )

    def refresh_handlers(self, specs: Sequence[HandlerSpec], now: datetime) -> None:
        """Update the stored declarations of handlers that have changed since they were enabled."""
        for spec in specs:
            with self._engine.connect() as connection:
                names = connection.execute(
                    select(schema.destinations.c.name, schema.subscriptions)
                    .join(schema.subscriptions, schema.subscriptions.c.destination_id == schema.destinations.c.id)
                    .where(schema.subscriptions.c.handler == spec.handler, schema.subscriptions.c.enabled)
                ).all()
            for row in names:
                if any(getattr(row, column) != value for column, value in spec.columns().items()):
                    self.enable_handler(row.name, spec, now)

    def pause_handler(self, handler: str, now: datetime, *, destination: str | None, reason: str) -> int:
        """Pause the handler until it is resumed. Returns the number of its bindings. `reason` is a fixed word."""
        return self._set_pause(handler, destination, now, "handler.pause", {"paused_at": now, "pause_reason": reason})

    def resume_handler(self, handler: str, now: datetime, *, destination: str | None, reason: str | None = None) -> int:
        """Resume a paused handler. Returns the number of its bindings. `reason`: an operator's words, for the audit
        log.
        """
        return self._set_pause(
            handler, destination, now, "handler.resume", {"paused_at": None, "pause_reason": None}, reason
        )

    def _set_pause(
        self,
        handler: str,
        destination: str | None,
        now: datetime,
        action: str,
        values: dict[str, Any],
        note: str | None = None,
    ) -> int:
        table = schema.subscriptions
        with self._change() as connection:
            query = (
                select(table.c.id, schema.destinations.c.name)
                .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
                .where(table.c.handler == handler)
            )
            if destination is not None:
                query = query.where(schema.destinations.c.name == destination)
            rows = connection.execute(query).all()
            if not rows:
                raise NotFound(
                    f"no handler {handler} is enabled{f' at {destination}' if destination else ''}: see `handlers list`"
                )
            for row in rows:
                connection.execute(update(table).where(table.c.id == row.id).values(values))
                self._add_event(
                    connection,
                    now,
                    action,
                    row.name,
                    f"subscriptions:{row.id}",
                    {"handler": handler, "why": values["pause_reason"]},
                    note,
                )
        return len(rows)

    def _subscription(self, connection: Connection, destination: str, handler: str) -> Row[Any]:
        owner = self._destination(connection, destination)
        table = schema.subscriptions
        row = connection.execute(
            select(table).where(table.c.destination_id == owner.id, table.c.handler == handler)
        ).one_or_none()
        if row is None:
            raise NotFound(f"{handler} is not enabled at {destination}: see `handlers list`")
        return row
