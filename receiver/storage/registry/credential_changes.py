"""Changes to credentials, with the key sets that they need."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, func, or_, select

from receiver.errors import Conflict
from receiver.keyring import Keyring
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import OtherCredential
from receiver.storage import schema
from receiver.storage.registry.credentials import CredentialFactory
from receiver.storage.registry.key_sets import KeySetChanges


class CredentialChanges(KeySetChanges):
    """Operations that change credentials."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        super().__init__(engine, keyring, actor=actor)
        self._factory = CredentialFactory(keyring)

    def add_credential(
        self,
        destination: str,
        now: datetime,
        kind: str,
        settings: Mapping[str, Any],
        secret: bytes | None,
        *,
        label: str | None = None,
        expires_at: datetime | None = None,
        fetched: bytes | None = None,
    ) -> int:
        """Add a credential, with the settings of its kind (receiver.protocol.verification). Returns its id.

        `fetched`: the current content of its jwks_url, needed if that URL is not known yet. Raises ConfigurationError,
        NotFound.
        """
        normal = self._factory.resolve(kind, settings, secret)
        with self._change() as connection:
            row = self._destination(connection, destination)
            self._check_others(connection, row.id, kind, normal, secret or b"")
            if "jwks_url" in normal:
                self._need_key_set(connection, normal["jwks_url"], fetched, now)
            credential_id = self._insert_credential(
                connection, row.id, kind, normal, secret, label=label, expires_at=expires_at
            )
            self._add_event(
                connection, now, "credential.add", destination, f"credentials:{credential_id}", {"kind": kind}
            )
        return credential_id

    def _insert_credential(
        self,
        connection: Connection,
        destination_id: int,
        kind: str,
        settings: Mapping[str, Any],
        secret: bytes | None,
        *,
        label: str | None = None,
        expires_at: datetime | None = None,
    ) -> int:
        """Insert a row with settings as CredentialFactory.resolve returns them. Returns its id."""
        credential_id = self._insert(
            connection,
            schema.credentials,
            {
                "destination_id": destination_id,
                "kind": kind,
                "label": label,
                "settings": settings,
                "expires_at": expires_at,
                "digest": None,
                "secret": None,
                "secret_key": None,
                "revoked_at": None,
            },
        )
        if secret is not None:
            # A sealed secret is bound to the id of its row, which is known only now.
            columns = self._factory.secret_columns(kind, secret, credential_id)
            self._update(
                connection, schema.credentials, self._row(connection, schema.credentials, credential_id), columns
            )
        return credential_id

    def _check_others(
        self, connection: Connection, destination_id: int, kind: str, settings: Mapping[str, Any], secret: bytes
    ) -> None:
        """See `CredentialKind.check_others`."""
        described = KINDS[kind]
        if not described.compares_others:
            return
        table = schema.credentials
        rows = connection.execute(
            select(table).where(
                table.c.destination_id == destination_id,
                table.c.kind == kind,
                or_(table.c.revoked_at.is_(None), table.c.revoked_at > func.now()),
            )
        ).mappings()
        described.check_others(
            msgspec.convert(dict(settings), described.settings),
            secret,
            [
                OtherCredential(id=row["id"], settings=row["settings"], secret=self._factory.open_secret({**row}))
                for row in rows
            ],
        )

    def revoke_credential(self, credential_id: int, now: datetime, *, grace: timedelta | None = None) -> None:
        """Revoke a credential, at once or after `grace`. Raises NotFound; Conflict when it is revoked already.

        Until the grace is over it is live, `restore_credential` cancels the revocation, and another call changes it.
        """
        with self._change() as connection:
            row = self._credential(connection, credential_id)
            # The database's clock decides this.
            at = func.now() if grace is None else func.now() + grace
            self._update(connection, schema.credentials, row, {"revoked_at": at})
            self._add_event(
                connection,
                now,
                "credential.revoke",
                self._name(connection, row.destination_id),
                f"credentials:{credential_id}",
                {"kind": row.kind} | ({} if grace is None else {"grace_seconds": int(grace.total_seconds())}),
            )

    def restore_credential(self, credential_id: int, now: datetime) -> None:
        """Cancel a revocation whose grace is not over. Raises NotFound; Conflict otherwise."""
        with self._change() as connection:
            row = self._credential(connection, credential_id)
            if row.revoked_at is None:
                raise Conflict(f"credential {credential_id} is not revoked: there is nothing to restore")
            self._update(connection, schema.credentials, row, {"revoked_at": None})
            self._add_event(
                connection,
                now,
                "credential.restore",
                self._name(connection, row.destination_id),
                f"credentials:{credential_id}",
                {"kind": row.kind},
            )

    def set_credential(self, credential_id: int, now: datetime, values: Mapping[str, Any]) -> None:
        """Change label or expires_at, also of an expired credential. Raises NotFound; Conflict when revoked."""
        with self._change() as connection:
            row = self._credential(connection, credential_id)
            self._update(connection, schema.credentials, row, values)
            ends = values.get("expires_at", row.expires_at)
            self._add_event(
                connection,
                now,
                "credential.set",
                self._name(connection, row.destination_id),
                f"credentials:{credential_id}",
                {
                    "kind": row.kind,
                    "was": row.expires_at and row.expires_at.isoformat(),
                    "expires_at": ends and ends.isoformat(),
                },
            )

    def _credential(self, connection: Connection, credential_id: int) -> Row[Any]:
        """Return a credential that is not revoked yet. Raises NotFound, Conflict."""
        row = self._row(connection, schema.credentials, credential_id)
        if row.revoked_at is not None and row.revoked_at <= connection.scalar(select(func.now())):
            raise Conflict(
                f"credential {credential_id} is revoked already, for good: add another with "
                f"`redox-receiver credential add {self._name(connection, row.destination_id)} --kind "
                f"{row.kind}`"
            )
        return row
