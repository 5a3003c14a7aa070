"""Changes to destinations and their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from receiver.errors import ConfigurationError, NotFound
from receiver.protocol.message import DESTINATION_NAME
from receiver.protocol.sources import normalize_source
from receiver.protocol.verification import parse_require
from receiver.storage import schema
from receiver.storage.registry.credential_changes import CredentialChanges


class DestinationChanges(CredentialChanges):
    """Operations that change destinations, each of which is added with a verification token, and sources."""

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
        expect_every: int | None = None,
    ) -> int:
        """Add a destination and its first token. Returns its id. Raises ConfigurationError, Conflict when the name is
        taken.
        """
        if not DESTINATION_NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is not a valid destination name: use a-z, 0-9 and -, at most 64 characters"
            )
        _check_require(require)
        secret = token.encode("utf-8", "surrogateescape")
        settings = self._factory.resolve("token", {}, secret)
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
                    "expect_every": expect_every,
                },
                taken=f"there is a destination {name} already: see `destination show {name}`",
            )
            self._insert_credential(connection, destination_id, "token", settings, secret)
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
        """Change columns of a destination (environment, enabled, require, policies, reply_with, expect_every).

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

    def add_source(self, destination: str, source_id: str | None, now: datetime, *, name: str | None) -> int:
        """Register a source (None: messages that name none), or enable it again. Returns its id. Raises NotFound."""
        normal = None if source_id is None else normalize_source(source_id)
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
        normal = None if source_id is None else normalize_source(source_id)
        with self._change() as connection:
            found = self._source(connection, self._destination(connection, destination).id, normal)
            if found is None:
                raise NotFound(f"{destination} has no such source: see `source list {destination}`")
            self._update(connection, schema.sources, found, {"enabled": False})
            self._add_event(connection, now, "source.disable", destination, f"sources:{found.id}", {"source": normal})

    def _source(self, connection: Connection, destination_id: int, source_id: str | None) -> Row[Any] | None:
        table = schema.sources
        return connection.execute(
            select(table).where(
                table.c.destination_id == destination_id, table.c.source_id.is_not_distinct_from(source_id)
            )
        ).one_or_none()


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
