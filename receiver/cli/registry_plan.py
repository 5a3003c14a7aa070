"""The plan of `registry apply`: the changes that make the database match a registry file.

Must not change anything: the command carries out the changes of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection

from receiver.cli.registry_file import Wanted, WantedCredential, WantedDestination, WantedSource
from receiver.cli.session import Session
from receiver.errors import ConfigurationError
from receiver.outbound.jwks import fetch
from receiver.protocol.registry import Destination
from receiver.protocol.sources import normalize_source
from receiver.protocol.verification import KINDS
from receiver.storage.operations import queries
from receiver.storage.registry import loader
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.credentials import CredentialFactory
from receiver.worker import discovery_process


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedCredential:
    """A credential with resolved settings and secret, ready to be stored."""

    wanted: WantedCredential
    settings: Mapping[str, Any]
    secret: bytes | None = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryChange:
    """One change: `+` adds, `~` changes from `was` to `becomes`, `-` disables or revokes."""

    sign: Literal["+", "~", "-"]
    what: Literal["destination", "credential", "source", "handler"]
    destination: str
    name: str
    was: Any = None
    becomes: Any = None
    carry_out: Callable[..., object] = field(repr=False)  # called with RegistryChanges, and now=


class RegistryPlan:
    """Compares a registry file with the database. Secrets are read from `folder`.

    A credential whose revocation is pending (`credential revoke --grace`) is neither added again nor revoked at once.
    """

    def __init__(self, session: Session, connection: Connection, folder: Path) -> None:
        self._modules = session.settings.handlers
        self._folder = folder
        self._known = loader.load_registry(connection, session.keyring).destinations
        self._factory = CredentialFactory(session.keyring)
        live = {each["id"] for each in queries.credentials(connection) if each["live"]}
        self._live_rows = [row for row in loader.credential_rows(connection, session.keyring) if row["id"] in live]
        self._rows = {each["name"]: each for each in queries.destinations(connection)}
        self._names = {(each["destination"], each["source_id"]): each["name"] for each in queries.sources(connection)}
        self._bound = {(each["destination"], each["handler"]): each for each in queries.subscriptions(connection)}

    def changes(self, wanted: Wanted, *, prune: bool) -> list[RegistryChange]:
        """Return the changes in order: additions before removals. Raises ConfigurationError."""
        found = [
            change
            for name, each in wanted.destinations.items()
            for change in self._destination(name, each, prune=prune)
        ]
        if prune:
            found += [
                _setting(name, "enabled", True, False)
                for name, row in self._rows.items()
                if row["enabled"] and name not in wanted.destinations
            ]
        return [each for each in found if each.sign != "-"] + [each for each in found if each.sign == "-"]

    def _destination(self, name: str, wanted: WantedDestination, *, prune: bool) -> Iterator[RegistryChange]:
        columns, row, known = wanted.columns, self._rows.get(name), self._known.get(name)
        credentials = [self._resolve(name, each) for each in wanted.credentials]
        if row is None:
            first = next(
                (each for each in credentials if each.wanted.kind == "token" and each.wanted.expires_at is None), None
            )
            if first is None:
                raise ConfigurationError(
                    f"destination {name}: add a credential of kind token without expires_at, "
                    "which the verification in the Redox dashboard requires"
                )
            credentials.remove(first)
            values = {column: value for column, value in columns.items() if column != "enabled"}
            yield RegistryChange(
                sign="+",
                what="destination",
                destination=name,
                name=name,
                becomes=values,
                carry_out=partial(RegistryChanges.add_destination, name=name, token=_text(first), **values),
            )
            row = values | {"enabled": True}
        elif known is None:
            raise ConfigurationError(
                f"destination {name}: another program has changed its row: run `redox-receiver audit verify`"
            )
        for column, value in columns.items():
            if row[column] != value:
                yield _setting(name, column, row[column], value)
        yield from self._credentials(name, credentials, known, prune)
        yield from self._sources(name, wanted.sources, known, prune)
        yield from self._handlers(name, wanted.handlers, prune)

    def _credentials(
        self, destination: str, wanted: Sequence[ResolvedCredential], known: Destination | None, prune: bool
    ) -> Iterator[RegistryChange]:
        alive = [] if known is None else [row for row in self._live_rows if row["destination_id"] == known.id]
        # A credential that stays is found before an equal one whose revocation is pending.
        alive.sort(key=_revocation_pending)
        kept: set[int] = set()
        for each in wanted:
            same = next(
                (row for row in alive if self._factory.same(row, each.wanted.kind, each.settings, each.secret)), None
            )
            kept |= set() if same is None else {same["id"]}
            if same is None or same["expires_at"] != each.wanted.ends:
                yield _adding_credential(destination, each)
            if same is not None and same["expires_at"] != each.wanted.ends and not _revocation_pending(same):
                yield _revoking(destination, same["id"])
        if prune:
            pruned = [row["id"] for row in alive if row["id"] not in kept and not _revocation_pending(row)]
            yield from (_revoking(destination, number) for number in pruned)

    def _resolve(self, destination: str, content: Mapping[str, Any]) -> ResolvedCredential:
        """Resolve a credential of the file, with its secret and keys. Raises ConfigurationError."""
        try:
            wanted = msgspec.convert(content, WantedCredential)
            if wanted.kind not in KINDS:
                raise ConfigurationError(f"unknown kind {wanted.kind!r}: use one of {', '.join(KINDS)}")
            settings = {
                name: value for name, value in content.items() if name not in WantedCredential.__struct_fields__
            }
            if wanted.keys_file is not None:
                settings["keys"] = self._read(wanted.keys_file).decode("utf-8", "replace")
            secret = None if wanted.file is None else _line(self._read(wanted.file))
            second = settings.pop(f"{KINDS[wanted.kind].second_secret}_file", None)
            resolved = self._factory.resolve(wanted.kind, settings, secret)
            if secret is not None and second is not None:
                secret += b"\n" + _line(self._read(str(second)))
        except (ConfigurationError, msgspec.ValidationError) as exc:
            raise ConfigurationError(f"destination {destination}, credentials: {exc}") from exc
        return ResolvedCredential(wanted=wanted, settings=resolved, secret=secret)

    def _sources(
        self, destination: str, wanted: Sequence[WantedSource], known: Destination | None, prune: bool
    ) -> Iterator[RegistryChange]:
        there = {} if known is None else known.sources
        ids = {None if each.id is None else normalize_source(each.id): each for each in wanted}
        for source_id, each in ids.items():
            name = self._names.get((destination, source_id))
            if not there.get(source_id) or (each.name is not None and each.name != name):
                yield RegistryChange(
                    sign="~" if source_id in there else "+",
                    what="source",
                    destination=destination,
                    name=source_id or "(none)",
                    was=name,
                    becomes=each.name,
                    carry_out=partial(
                        RegistryChanges.add_source, destination=destination, source_id=source_id, name=each.name
                    ),
                )
        if prune:
            for source_id in [source_id for source_id, enabled in there.items() if enabled and source_id not in ids]:
                yield RegistryChange(
                    sign="-",
                    what="source",
                    destination=destination,
                    name=source_id or "(none)",
                    carry_out=partial(RegistryChanges.disable_source, destination=destination, source_id=source_id),
                )

    def _handlers(self, destination: str, wanted: Sequence[str], prune: bool) -> Iterator[RegistryChange]:
        for name in wanted:
            spec = discovery_process.declared_handler(name, self._modules).spec
            row = self._bound.get((destination, name))
            if row is None or not row["enabled"] or not _declared(row, spec.columns()):
                yield RegistryChange(
                    sign="+" if row is None else "~",
                    what="handler",
                    destination=destination,
                    name=name,
                    becomes=list(spec.patterns),
                    carry_out=partial(RegistryChanges.enable_handler, destination=destination, spec=spec),
                )
        if prune:
            for (owner, name), row in self._bound.items():
                if owner == destination and row["enabled"] and name not in wanted:
                    yield RegistryChange(
                        sign="-",
                        what="handler",
                        destination=destination,
                        name=name,
                        carry_out=partial(RegistryChanges.disable_handler, destination=destination, handler=name),
                    )

    def _read(self, file: str) -> bytes:
        path = self._folder / file
        try:
            return path.read_bytes()
        except OSError as exc:
            raise ConfigurationError(f"{path} cannot be read: {exc.strerror}") from exc


def _revocation_pending(row: Mapping[str, Any]) -> bool:
    """Return whether a live credential is to be revoked later."""
    return row["revoked_at"] is not None


def _line(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _declared(row: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    """Return whether a subscription matches the handler's declaration. Timeouts are 32-bit floats in the database."""
    return all(
        math.isclose(row[name], value, rel_tol=1e-6) if isinstance(value, float) else row[name] == value
        for name, value in columns.items()
    )


def _setting(destination: str, column: str, was: Any, becomes: Any) -> RegistryChange:
    return RegistryChange(
        sign="-" if column == "enabled" and not becomes else "~",
        what="destination",
        destination=destination,
        name=column,
        was=was,
        becomes=becomes,
        carry_out=partial(RegistryChanges.set_destination, name=destination, values={column: becomes}),
    )


def _adding_credential(destination: str, resolved: ResolvedCredential) -> RegistryChange:
    wanted = resolved.wanted
    add = partial(_add, kind=wanted.kind, settings=resolved.settings, secret=resolved.secret)
    shown = {name: value for name, value in resolved.settings.items() if name != "keys"}
    return RegistryChange(
        sign="+",
        what="credential",
        destination=destination,
        name=wanted.label or wanted.kind,
        becomes={"kind": wanted.kind, "expires_at": wanted.ends, **shown},
        carry_out=partial(add, destination=destination, label=wanted.label, expires_at=wanted.ends),
    )


def _add(registration: RegistryChanges, *, settings: Mapping[str, Any], **how: Any) -> None:
    """Register the credential, with the keys that its JWKS URL serves now."""
    fetched = fetch(settings["jwks_url"]) if "jwks_url" in settings else None
    registration.add_credential(settings=settings, fetched=fetched, **how)


def _revoking(destination: str, credential_id: int) -> RegistryChange:
    return RegistryChange(
        sign="-",
        what="credential",
        destination=destination,
        name=str(credential_id),
        carry_out=partial(RegistryChanges.revoke_credential, credential_id=credential_id),
    )


def _text(token: ResolvedCredential) -> str:
    # The registration rejects text that is not ASCII. The conversion here must only not fail.
    return (token.secret or b"").decode("latin-1")
