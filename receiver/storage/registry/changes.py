"""Registry changes: each is one transaction with an audit row, a MAC on every row, and a new version.

Must not serve reads (see receiver.storage.registry.loader, receiver.storage.operations.queries).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Engine, Row, Table, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError as ConstraintViolation

from receiver.database.engine import sqlstate
from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.protocol.jose import read_keys
from receiver.protocol.message import DESTINATION_NAME
from receiver.protocol.reading import normalise_source
from receiver.protocol.verification import KINDS, parse_require
from receiver.protocol.verification.kind import OtherCredential
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.registry.credentials import CredentialFactory

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


class RegistryChanges:
    """Operations that change the registry. `actor`: the name in the audit log (USER@HOST, or worker:NAME)."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._keyring = keyring
        self._seals = Sealer(keyring)
        self._factory = CredentialFactory(keyring)
        self._audit = AuditChain(keyring, self._seals)
        self._actor = actor
        self._key = keyring.current("mac")

    # --- destinations

    def add_destination(
        self,
        name: str,
        now: datetime,
        *,
        environment: str,
        require: Sequence[str],
        sources_policy: str,
        on_unknown_source: str,
        test_messages: str,
        reply_with: str | None,
        token: str,
    ) -> int:
        """Add a destination and its first token. Returns its id. Raises ConfigurationError, Conflict when the name is
        taken.
        """
        if not DESTINATION_NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is not a valid destination name: use a-z, 0-9 and -, at most 64 characters"
            )
        _check_require(require)
        with self._change() as connection:
            _check_reply_with(connection, reply_with, environment)
            destination_id = self._insert(
                connection,
                schema.destinations,
                {
                    "name": name,
                    "environment": environment,
                    "enabled": True,
                    "require": list(require),
                    "sources_policy": sources_policy,
                    "on_unknown_source": on_unknown_source,
                    "test_messages": test_messages,
                    "reply_with": reply_with,
                },
                taken=f"there is a destination {name} already: see `destination show {name}`",
            )
            self._add_token(connection, destination_id, token, label=None, expires_at=None)
            self._add_event(
                connection,
                now,
                "destination.add",
                name,
                f"destinations:{destination_id}",
                {"environment": environment, "require": list(require), "sources": sources_policy},
            )
        return destination_id

    def set_destination(self, name: str, now: datetime, values: Mapping[str, Any]) -> None:
        """Change columns of a destination (environment, enabled, require, policies, reply_with).

        Raises NotFound; ConfigurationError for an API key of another environment.
        """
        if "require" in values:
            _check_require(values["require"])
        with self._change() as connection:
            row = self._destination(connection, name)
            _check_reply_with(
                connection, values.get("reply_with", row.reply_with), values.get("environment", row.environment)
            )
            self._update(connection, schema.destinations, row, values)
            self._add_event(connection, now, "destination.set", name, f"destinations:{row.id}", dict(values))

    # --- credentials

    def add_token(
        self, destination: str, now: datetime, token: str, *, label: str | None, expires_at: datetime | None
    ) -> int:
        """Add a verification token. Returns its id. Raises ConfigurationError under MIN_SECRET_LENGTH characters."""
        with self._change() as connection:
            row = self._destination(connection, destination)
            credential_id = self._add_token(connection, row.id, token, label=label, expires_at=expires_at)
            self._add_event(
                connection, now, "credential.add", destination, f"credentials:{credential_id}", {"kind": "token"}
            )
        return credential_id

    def add_hmac(
        self,
        destination: str,
        now: datetime,
        secret: bytes,
        settings: Mapping[str, Any],
        *,
        label: str | None,
        expires_at: datetime | None,
    ) -> int:
        """Add a webhook signing secret, with settings of HmacCredential. Returns its id. Raises ConfigurationError."""
        return self.add_credential(destination, now, "hmac", settings, secret, label=label, expires_at=expires_at)

    def add_credential(
        self,
        destination: str,
        now: datetime,
        kind: str,
        settings: Mapping[str, Any],
        secret: bytes | None,
        *,
        label: str | None,
        expires_at: datetime | None,
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
            credential_id = self._insert(
                connection,
                schema.credentials,
                {
                    "destination_id": row.id,
                    "kind": kind,
                    "label": label,
                    "settings": normal,
                    "expires_at": expires_at,
                    "digest": None,
                    "secret": None,
                    "secret_key": None,
                    "revoked_at": None,
                },
            )
            if secret is not None:
                # Sealed to its own id, which is known only now.
                kept = self._factory.secret_columns(kind, secret, credential_id)
                added = self._row(connection, schema.credentials, credential_id)
                self._update(connection, schema.credentials, added, kept)
            self._add_event(
                connection, now, "credential.add", destination, f"credentials:{credential_id}", {"kind": kind}
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

    # --- key sets

    def keys_fetched(self, url: str, document: bytes, now: datetime) -> bool:
        """Store the current content of a key set's URL. Returns whether it has changed. Raises ConfigurationError."""
        read_keys(document)
        with self._engine.begin() as connection:
            row = connection.execute(select(schema.key_sets).where(schema.key_sets.c.url == url)).one_or_none()
            if row is not None and row.document == document:
                connection.execute(
                    update(schema.key_sets)
                    .where(schema.key_sets.c.id == row.id)
                    .values(fetched_at=func.now(), failure=None)
                )
                return False
        with self._change() as connection:
            self._put_key_set(connection, url, document, now)
        return True

    def keys_not_fetched(self, url: str, failure: str) -> None:
        """Record that fetching failed: the keys stay, and `failure` says why."""
        with self._engine.begin() as connection:
            connection.execute(update(schema.key_sets).where(schema.key_sets.c.url == url).values(failure=failure))

    def _need_key_set(self, connection: Connection, url: str, fetched: bytes | None, now: datetime) -> None:
        known = connection.scalar(select(schema.key_sets.c.id).where(schema.key_sets.c.url == url))
        if fetched is not None:
            read_keys(fetched)
            self._put_key_set(connection, url, fetched, now)
        elif known is None:
            raise ConfigurationError(f"the keys at {url} were never fetched")

    def _put_key_set(self, connection: Connection, url: str, document: bytes, now: datetime) -> None:
        table = schema.key_sets
        # The database's clock decides when it is due again, and how old it is.
        times = {"changed_at": now, "fetched_at": func.now(), "tried_at": func.now(), "failure": None}
        row = connection.execute(select(table).where(table.c.url == url)).one_or_none()
        if row is None:
            number = self._insert(connection, table, {"url": url, "document": document} | times)
        else:
            number = row.id
            self._update(connection, table, row, {"document": document} | times)
        self._add_event(
            connection,
            now,
            "key_set.change",
            None,
            f"key_sets:{number}",
            {"url": url, "keys": [key.kid for key in read_keys(document)]},
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

    # --- sources

    def add_source(self, destination: str, source_id: str | None, now: datetime, *, name: str | None) -> int:
        """Register a source (None: messages that name none), or enable it again. Returns its id. Raises NotFound."""
        normal = None if source_id is None else normalise_source(source_id)
        if normal == "":
            raise ConfigurationError("the source id is empty: to register messages that name no source, use `--none`")
        with self._change() as connection:
            owner = self._destination(connection, destination)
            found = self._source(connection, owner.id, normal)
            if found is None:
                number = self._insert(
                    connection,
                    schema.sources,
                    {"destination_id": owner.id, "source_id": normal, "name": name, "enabled": True},
                )
            else:
                number = found.id
                self._update(connection, schema.sources, found, {"enabled": True, "name": name or found.name})
            self._add_event(connection, now, "source.add", destination, f"sources:{number}", {"source": normal})
        return int(number)

    def disable_source(self, destination: str, source_id: str | None, now: datetime) -> None:
        """Refuse a source from now on. Raises NotFound."""
        normal = None if source_id is None else normalise_source(source_id)
        with self._change() as connection:
            found = self._source(connection, self._destination(connection, destination).id, normal)
            if found is None:
                raise NotFound(f"{destination} has no such source: see `source list {destination}`")
            self._update(connection, schema.sources, found, {"enabled": False})
            self._add_event(connection, now, "source.disable", destination, f"sources:{found.id}", {"source": normal})

    # --- handlers

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

    def hold_restored(self, now: datetime) -> int:
        """Pause each handler that has pending deliveries. Returns the number of bindings.

        A restored database does not know which of them have run since the backup. New messages wait behind them, in
        order. `resume_handler` lets them run.
        """
        table, waits = schema.subscriptions, schema.deliveries
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(table.c.handler, schema.destinations.c.name)
                .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
                .where(
                    table.c.paused_at.is_(None),
                    exists().where(
                        waits.c.state == "pending",
                        ~waits.c.inline,
                        waits.c.handler == table.c.handler,
                        waits.c.destination_id == table.c.destination_id,
                    ),
                )
            ).all()
        return sum(self.pause_handler(row.handler, now, destination=row.name, reason=RESTORED) for row in rows)

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

    # --- transactions

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

    def _add_token(
        self, connection: Connection, destination_id: int, token: str, *, label: str | None, expires_at: datetime | None
    ) -> int:
        secret = token.encode("utf-8", "surrogateescape")
        settings = self._factory.resolve("token", {}, secret)
        return self._insert(
            connection,
            schema.credentials,
            {
                "destination_id": destination_id,
                "kind": "token",
                "label": label,
                "expires_at": expires_at,
                "secret": None,
                "settings": settings,
                "revoked_at": None,
                **self._factory.secret_columns("token", secret, 0),
            },
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

    def _source(self, connection: Connection, destination_id: int, source_id: str | None) -> Row[Any] | None:
        table = schema.sources
        return connection.execute(
            select(table).where(
                table.c.destination_id == destination_id, table.c.source_id.is_not_distinct_from(source_id)
            )
        ).one_or_none()

    def _name(self, connection: Connection, destination_id: int) -> str:
        table = schema.destinations
        return str(connection.scalar(select(table.c.name).where(table.c.id == destination_id)))

    def _subscription(self, connection: Connection, destination: str, handler: str) -> Row[Any]:
        owner = self._destination(connection, destination)
        table = schema.subscriptions
        row = connection.execute(
            select(table).where(table.c.destination_id == owner.id, table.c.handler == handler)
        ).one_or_none()
        if row is None:
            raise NotFound(f"{handler} is not enabled at {destination}: see `handlers list`")
        return row


def new_token() -> str:
    """Return a verification token: 256 random bits, in characters that Redox's dashboard accepts."""
    return secrets.token_urlsafe(32)


def _check_require(require: Sequence[str]) -> None:
    try:
        parse_require(require)
    except ValueError as exc:
        raise ConfigurationError(f"--require: {exc}") from None


def _check_reply_with(connection: Connection, reply_with: str | None, environment: str) -> None:
    if reply_with is None:
        return
    table = schema.api_keys
    of = connection.scalar(select(table.c.environment).where(table.c.name == reply_with))
    if of is None:
        raise NotFound(f"there is no API key {reply_with}: see `outbound key list`")
    if of != environment:
        raise ConfigurationError(
            f"API key {reply_with} is for {of}, and the destination for {environment}: name a key "
            "of the same environment"
        )
