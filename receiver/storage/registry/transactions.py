"""Transactions that change the registry: each has an audit row, a MAC on every changed row, and a new version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, insert, select, update
from sqlalchemy.exc import IntegrityError as ConstraintViolation

from receiver.database.engine import sqlstate
from receiver.errors import Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import mac_key, row_mac


class RegistryTransactions:
    """The base of classes that change the registry. `actor`: the name in the audit log (USER@HOST, or worker:NAME)."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._keyring = keyring
        self._seals = Sealer(keyring)
        self._audit = AuditChain(keyring, self._seals)
        self._actor = actor
        self._key = keyring.current("mac")

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """Run one transaction. It locks the version's row first, so that changes are serialized."""
        try:
            with self._engine.begin() as connection:
                version = schema.registry_version.c.version
                connection.execute(update(schema.registry_version).values(version=version + 1))
                yield connection
        except BaseException:
            self._audit.restart()
            raise

    def _add_event(
        self,
        connection: Connection,
        now: datetime,
        action: str,
        destination: str | None,
        subject: str,
        detail: dict[str, Any],
        note: str | None = None,
    ) -> None:
        write(
            connection,
            self._audit,
            [
                AuditEvent(
                    action=action,
                    outcome="done",
                    at=now,
                    actor=self._actor,
                    destination=destination,
                    subject=subject,
                    detail=detail,
                    note=note,
                )
            ],
        )

    def _insert(self, connection: Connection, table: Table, values: Mapping[str, Any], taken: str | None = None) -> int:
        try:
            with connection.begin_nested():
                number = int(
                    connection.execute(
                        insert(table).values(**values, mac=b"", mac_key=self._key.id).returning(table.c.id)
                    ).scalar_one()
                )
        except ConstraintViolation as exc:
            if sqlstate(exc) != "23505":
                raise
            raise Conflict(taken) from None
        self._sign(connection, table, number)
        return number

    def _update(self, connection: Connection, table: Table, row: Row[Any], values: Mapping[str, Any]) -> None:
        """Change a row and sign it again. A row whose MAC fails is never signed: that would make it valid."""
        if row_mac(mac_key(self._keyring[row.mac_key]), table.name, row._asdict()) != row.mac:
            raise IntegrityError(
                f"row {row.id} of {table.name} was changed by something else: run "
                "`redox-receiver audit verify`, and restore the row from a backup"
            )
        connection.execute(update(table).where(table.c.id == row.id).values(**values))
        self._sign(connection, table, row.id)

    def _sign(self, connection: Connection, table: Table, number: int) -> None:
        """Set the row's MAC from its stored values, so that it covers its id and defaults."""
        row = dict(connection.execute(select(table).where(table.c.id == number)).mappings().one())
        connection.execute(
            update(table)
            .where(table.c.id == number)
            .values(mac=row_mac(mac_key(self._key), table.name, row), mac_key=self._key.id)
        )

    def _row(self, connection: Connection, table: Table, number: int) -> Row[Any]:
        row = connection.execute(select(table).where(table.c.id == number)).one_or_none()
        if row is None:
            raise NotFound(f"there is no row {number} in {table.name}")
        return row

    def _destination(self, connection: Connection, name: str) -> Row[Any]:
        table = schema.destinations
        row = connection.execute(select(table).where(table.c.name == name)).one_or_none()
        if row is None:
            raise NotFound(f"there is no destination {name}: see `destination list`")
        return row

    def _name(self, connection: Connection, destination_id: int) -> str:
        table = schema.destinations
        return str(connection.scalar(select(table.c.name).where(table.c.id == destination_id)))
