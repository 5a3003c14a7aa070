"""API keys for Redox: registration, and opening for the process that calls Redox.

Must not call Redox. A key's row is verified when it is opened: a row that something else has changed is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, func, select

from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.protocol.api_keys import ApiKey, LegacyKey, load_oauth_key
from receiver.protocol.message import DESTINATION_NAME
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.registry import signing_keys
from receiver.storage.registry.loader import mac_verifies
from receiver.storage.registry.transactions import RegistryTransactions

_table: Final = schema.api_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class OAuthKeySpec:
    """The settings of an OAuth API key. `private_key`: PEM or JWK; None: the active signing key."""

    client_id: str
    private_key: bytes | None = field(default=None, repr=False)
    kid: str | None = None
    scope: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiEndpoint:
    """What a key is for: a Redox environment, its base URL (checked by the caller), the source it sends as."""

    environment: str
    base_url: str
    source_id: str | None
    query_path: str = "/endpoint"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """A registered API key, verified but not opened.

    `several`: there are others of its environment, so that Redox requires each message's source. `version` changes with
    its row; the rotation of a signing key does not change it.
    """

    name: str
    legacy: bool
    base_url: str
    source_id: str | None
    query_path: str
    environment: str
    several: bool
    version: bytes = field(repr=False)


class ApiKeys(RegistryTransactions):
    """Operations on API keys, each audited."""

    def add_api_key(
        self, name: str, where: ApiEndpoint, key: OAuthKeySpec | LegacyKey, now: datetime, *, replace: bool = False
    ) -> dict[str, Any]:
        """Register a key, or with `replace` replace the one of that name. Returns its row, without secrets.

        Raises ConfigurationError for unusable settings, Conflict when the name is taken, NotFound when it does not
        exist.
        """
        if not DESTINATION_NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} is not a valid API key name: use a-z, 0-9 and -, at most 64 characters")
        values = {
            "name": name,
            "environment": where.environment,
            "base_url": where.base_url,
            "source_id": where.source_id,
            "query_path": where.query_path,
            **self._columns(name, key),
        }
        with self._change() as connection:
            if replace:
                row = connection.execute(select(_table).where(_table.c.name == name)).one_or_none()
                if row is None:
                    raise NotFound(f"there is no API key {name}: omit --replace")
                self._check_destinations(connection, name, where.environment)
                self._update(connection, _table, row, values)
                number = row.id
            else:
                number = self._insert(
                    connection,
                    _table,
                    values,
                    taken=(f"there is an API key {name} already: use --replace to replace it"),
                )
            self._add_event(
                connection,
                now,
                "api_key.replace" if replace else "api_key.add",
                None,
                f"api_keys:{number}",
                {name: values[name] for name in ("name", "environment", "kind", "base_url", "source_id", "client_id")},
            )
        with self._engine.connect() as connection:
            return next(each for each in rows(connection) if each["name"] == name)

    def _columns(self, name: str, key: OAuthKeySpec | LegacyKey) -> dict[str, Any]:
        if isinstance(key, LegacyKey):
            secret = msgspec.json.encode({"apiKey": key.api_key, "secret": key.secret})
            columns: dict[str, Any] = {"kind": "legacy", "client_id": None, "kid": None, "scope": None}
        else:
            if not key.client_id:
                raise ConfigurationError("an OAuth API key needs its client id: copy it from the Redox dashboard")
            columns = {"kind": "oauth", "client_id": key.client_id, "kid": None, "scope": key.scope}
            if key.private_key is None:
                return columns | {"secret": None, "secret_key": None}
            secret = key.private_key
            columns["kid"] = load_oauth_key(secret, client_id=key.client_id, kid=key.kid).kid
        key_id, sealed = self._seals.seal("secret", secret, _binding(name))
        return columns | {"secret": sealed, "secret_key": key_id}

    def _check_destinations(self, connection: Connection, name: str, environment: str) -> None:
        other = connection.scalar(
            select(schema.destinations.c.name)
            .where(schema.destinations.c.reply_with == name, schema.destinations.c.environment != environment)
            .limit(1)
        )
        if other is not None:
            raise Conflict(
                f"destination {other} replies with {name}, and is not of {environment}: give the key "
                "another name, or the destination another key"
            )


def rows(connection: Connection) -> list[dict[str, Any]]:
    """Return all keys by name, without secrets."""
    shown = [each for each in _table.c if each.name not in ("mac", "mac_key", "secret", "secret_key")]
    return [dict(row) for row in connection.execute(select(*shown).order_by(_table.c.name)).mappings()]


def load_api_keys(connection: Connection, keyring: Keyring, name: str) -> StoredKey:
    """Return the key of that name. Raises NotFound, IntegrityError."""
    row = _verified(connection, keyring, name)
    alike = connection.scalar(
        select(func.count())
        .select_from(_table)
        .where(_table.c.kind == "oauth", _table.c.environment == row.environment, _table.c.base_url == row.base_url)
    )
    return StoredKey(
        name=name,
        legacy=row.kind == "legacy",
        base_url=row.base_url,
        source_id=row.source_id,
        query_path=row.query_path,
        environment=row.environment,
        several=row.kind == "oauth" and (alike or 0) > 1,
        version=row.mac,
    )


def open_key(connection: Connection, keyring: Keyring, name: str) -> ApiKey:
    """Return the key of that name, opened. Raises NotFound, IntegrityError, ConfigurationError (no signing key)."""
    row = _verified(connection, keyring, name)
    if row.kind == "oauth" and row.secret is None:
        kid, pem = signing_keys.active(connection, keyring)
        return load_oauth_key(pem, client_id=row.client_id, kid=kid, scope=row.scope)
    secret = Sealer(keyring).open(row.secret_key, row.secret, _binding(name))
    if row.kind == "oauth":
        return load_oauth_key(secret, client_id=row.client_id, kid=row.kid, scope=row.scope)
    members = msgspec.json.decode(secret)
    return LegacyKey(api_key=members["apiKey"], secret=members["secret"])


def of_destination(connection: Connection, keyring: Keyring, destination: str) -> str:
    """Return the name of the key that a destination replies with. Raises ConfigurationError when it has none."""
    table = schema.destinations
    row = connection.execute(select(table).where(table.c.name == destination)).one_or_none()
    if row is None or not mac_verifies(table, row._asdict(), keyring):
        raise NotFound(f"there is no destination {destination} whose row is valid: see `destination list`")
    if row.reply_with is None:
        raise ConfigurationError(
            f"{destination} has no API key for requests to Redox: run `redox-receiver "
            f"destination set {destination} --reply-with KEY`; see `outbound key list`"
        )
    return str(row.reply_with)


def only_one(connection: Connection) -> str:
    """Return the name of the only key. Raises ConfigurationError unless there is exactly one."""
    names = list(connection.scalars(select(_table.c.name).order_by(_table.c.name)))
    if not names:
        raise ConfigurationError("no API key is registered: run `redox-receiver outbound key add`")
    if len(names) > 1:
        raise ConfigurationError(f"several API keys are registered ({', '.join(names)}): name one with --key")
    return str(names[0])


def _verified(connection: Connection, keyring: Keyring, name: str) -> Row[Any]:
    row = connection.execute(select(_table).where(_table.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"there is no API key {name}: see `redox-receiver outbound key list`")
    if not mac_verifies(_table, row._asdict(), keyring):
        raise IntegrityError(
            f"API key {name} was changed by something else: run `redox-receiver audit verify`, and "
            "restore the row from a backup"
        )
    return row


def _binding(name: str) -> str:
    return f"api_key:{name}"
