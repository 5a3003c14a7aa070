"""The registry as a file: what it says, and the changes that make the database say the same.

May not change anything: each change is carried out by whoever asked for the plan. Secrets are in files of their own.
"""

from __future__ import annotations

import hmac
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Connection

from receiver.cli.session import Session
from receiver.errors import ConfigurationError
from receiver.handlers import discovery
from receiver.protocol.reading import normalise_source
from receiver.protocol.registry import (
    Credential,
    Destination,
    Environment,
    HmacCredential,
    SourcesPolicy,
    TestPolicy,
    TokenCredential,
    UnknownSourcePolicy,
    default_test_policy,
    live,
)
from receiver.storage import reading, registry
from receiver.storage.registration import Registration


class WantedCredential(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A credential; its secret is in `file`, a path from the registry file's folder. All else as in `credential add`; a
    time without an offset is UTC.
    """

    kind: Literal["token", "hmac"]
    file: str
    label: str | None = None
    expires_at: datetime | None = None
    header: str | None = None
    hash: Literal["sha256", "sha384", "sha512"] | None = None
    encoding: Literal["hex", "base64", "base64url"] | None = None
    prefix: str | None = None
    timestamp_header: str | None = None
    tolerance: int | None = None

    @property
    def ends(self) -> datetime | None:
        """From when on it opens nothing, aware."""
        time = self.expires_at
        return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of kind hmac that are given."""
        given = {name: getattr(self, name) for name in _HMAC if getattr(self, name) is not None}
        return given | {name: given[name].lower() for name in ("header", "timestamp_header") if name in given}


class WantedSource(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A source that is let in; without `id`, messages that name no source."""

    id: str | None = None
    name: str | None = None


class WantedDestination(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A destination; what is left out has the default of `destination add`."""

    environment: Environment = "development"
    enabled: bool = True
    require: list[str] = msgspec.field(default_factory=lambda: ["token"])
    sources_policy: SourcesPolicy = "registered"
    on_unknown_source: UnknownSourcePolicy = "reject"
    test_messages: TestPolicy | None = None
    reply_with: str | None = None
    credentials: list[WantedCredential] = []
    sources: list[WantedSource] = []
    handlers: list[str] = []

    @property
    def columns(self) -> dict[str, Any]:
        """Its own columns."""
        said = {name: getattr(self, name) for name in _COLUMNS}
        return said | {"test_messages": self.test_messages or default_test_policy(self.environment)}


class Wanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file: `[destinations.NAME]` tables."""

    destinations: dict[str, WantedDestination]


_HMAC: Final = ("header", "hash", "encoding", "prefix", "timestamp_header", "tolerance")
_COLUMNS: Final = ("environment", "enabled", "require", "sources_policy", "on_unknown_source", "test_messages",
                   "reply_with")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One step: `+` adds, `~` changes from `was` to `becomes`, `-` disables or revokes."""

    sign: Literal["+", "~", "-"]
    what: Literal["destination", "credential", "source", "handler"]
    destination: str
    name: str
    was: Any = None
    becomes: Any = None
    carry_out: Callable[..., object] = field(repr=False)  # with a Registration, and now=


def read(path: Path) -> Wanted:
    """The file. Raises ConfigurationError."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Wanted)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc


class Plan:
    """Compares a file, whose secrets are read from `folder`, with what is registered now."""

    def __init__(self, session: Session, connection: Connection, folder: Path, now: datetime) -> None:
        self._modules = session.settings.handlers
        self._folder = folder
        self._now = now
        self._known = registry.load(connection, session.keyring).destinations
        self._rows = {each["name"]: each for each in reading.destinations(connection)}
        self._names = {(each["destination"], each["source_id"]): each["name"] for each in reading.sources(connection)}
        self._bound = {(each["destination"], each["handler"]): each for each in reading.subscriptions(connection)}

    def changes(self, wanted: Wanted, *, prune: bool) -> list[Change]:
        """What is to be done, in this order: what is added before what is taken away. Raises ConfigurationError."""
        found = [change for name, each in wanted.destinations.items()
                 for change in self._destination(name, each, prune=prune)]
        if prune:
            found += [_setting(name, "enabled", True, False) for name, row in self._rows.items()
                      if row["enabled"] and name not in wanted.destinations]
        return [each for each in found if each.sign != "-"] + [each for each in found if each.sign == "-"]

    def _destination(self, name: str, wanted: WantedDestination, *, prune: bool) -> Iterator[Change]:
        columns, row, known = wanted.columns, self._rows.get(name), self._known.get(name)
        secrets = [(each, self._secret(each)) for each in wanted.credentials]
        if row is None:
            first = next((pair for pair in secrets if pair[0].kind == "token" and pair[0].expires_at is None), None)
            if first is None:
                raise ConfigurationError(f"destination {name}: give it a credential of kind token without expires_at, "
                                         "which the dashboard's verification needs")
            secrets.remove(first)
            values = {column: value for column, value in columns.items() if column != "enabled"}
            yield Change(sign="+", what="destination", destination=name, name=name, becomes=values,
                         carry_out=partial(Registration.add_destination, name=name, token=_text(first[1]), **values))
            row = values | {"enabled": True}
        elif known is None:
            raise ConfigurationError(f"destination {name}: its row was changed by something else: run "
                                     "`redox-receiver audit verify`")
        for column, value in columns.items():
            if row[column] != value:
                yield _setting(name, column, row[column], value)
        yield from self._credentials(name, secrets, known, prune)
        yield from self._sources(name, wanted.sources, known, prune)
        yield from self._handlers(name, wanted.handlers, prune)

    def _credentials(self, destination: str, wanted: Sequence[tuple[WantedCredential, bytes]],
                     known: Destination | None, prune: bool) -> Iterator[Change]:
        alive = [] if known is None else [each for each in known.credentials if live(each, self._now)]
        kept: set[int] = set()
        for each, secret in wanted:
            same = next((one for one in alive if _same(one, each, secret)), None)
            kept |= set() if same is None else {same.id}
            if same is None or same.expires_at != each.ends:
                yield _adding_credential(destination, each, secret)
            if same is not None and same.expires_at != each.ends:
                yield _revoking(destination, same)
        if prune:
            yield from (_revoking(destination, each) for each in alive if each.id not in kept)

    def _sources(self, destination: str, wanted: Sequence[WantedSource], known: Destination | None,
                 prune: bool) -> Iterator[Change]:
        there = {} if known is None else known.sources
        ids = {None if each.id is None else normalise_source(each.id): each for each in wanted}
        for source_id, each in ids.items():
            name = self._names.get((destination, source_id))
            if not there.get(source_id) or (each.name is not None and each.name != name):
                yield Change(sign="~" if source_id in there else "+", what="source", destination=destination,
                             name=source_id or "(none)", was=name, becomes=each.name, carry_out=partial(
                                 Registration.add_source, destination=destination, source_id=source_id, name=each.name))
        if prune:
            for source_id in [source_id for source_id, enabled in there.items() if enabled and source_id not in ids]:
                yield Change(sign="-", what="source", destination=destination, name=source_id or "(none)",
                             carry_out=partial(Registration.disable_source, destination=destination,
                                               source_id=source_id))

    def _handlers(self, destination: str, wanted: Sequence[str], prune: bool) -> Iterator[Change]:
        for name in wanted:
            spec = discovery.load_one(name, self._modules).spec
            row = self._bound.get((destination, name))
            if row is None or not row["enabled"] or not _declared(row, spec.columns()):
                yield Change(sign="+" if row is None else "~", what="handler", destination=destination, name=name,
                             becomes=list(spec.patterns), carry_out=partial(
                                 Registration.enable_handler, destination=destination, spec=spec))
        if prune:
            for (owner, name), row in self._bound.items():
                if owner == destination and row["enabled"] and name not in wanted:
                    yield Change(sign="-", what="handler", destination=destination, name=name,
                                 carry_out=partial(Registration.disable_handler, destination=destination, handler=name))

    def _secret(self, wanted: WantedCredential) -> bytes:
        path = self._folder / wanted.file
        try:
            text = path.read_bytes()
        except OSError as exc:
            raise ConfigurationError(f"the secret in {path} cannot be read: {exc.strerror}") from exc
        return text.removesuffix(b"\n").removesuffix(b"\r")


def _same(known: Credential, wanted: WantedCredential, secret: bytes) -> bool:
    """Whether it is the same credential: its kind, its secret, and how it is used. A label is only a name."""
    if isinstance(known, TokenCredential):
        return wanted.kind == "token" and hmac.compare_digest(hmac.digest(known.key, secret, "sha256"), known.digest)
    if not isinstance(known, HmacCredential) or wanted.kind != "hmac":
        return False
    as_wanted = HmacCredential(id=0, secret=secret, **wanted.settings)
    return all(getattr(known, name) == getattr(as_wanted, name) for name in ("secret", *_HMAC))


def _declared(row: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    """Whether a subscription stands as the handler is declared now; the database keeps time-outs as 32 bits."""
    return all(math.isclose(row[name], value, rel_tol=1e-6) if isinstance(value, float) else row[name] == value
               for name, value in columns.items())


def _setting(destination: str, column: str, was: Any, becomes: Any) -> Change:
    return Change(sign="-" if column == "enabled" and not becomes else "~", what="destination", destination=destination,
                  name=column, was=was, becomes=becomes,
                  carry_out=partial(Registration.set_destination, name=destination, values={column: becomes}))


def _adding_credential(destination: str, wanted: WantedCredential, secret: bytes) -> Change:
    add: Callable[..., object] = partial(Registration.add_hmac, secret=secret, settings=wanted.settings)
    if wanted.kind == "token":
        add = partial(Registration.add_token, token=_text(secret))
    return Change(sign="+", what="credential", destination=destination, name=wanted.label or wanted.kind,
                  becomes={"kind": wanted.kind, "expires_at": wanted.ends, **wanted.settings},
                  carry_out=partial(add, destination=destination, label=wanted.label, expires_at=wanted.ends))


def _revoking(destination: str, known: Credential) -> Change:
    return Change(sign="-", what="credential", destination=destination, name=str(known.id),
                  carry_out=partial(Registration.revoke_credential, credential_id=known.id))


def _text(token: bytes) -> str:
    # What is not ASCII is refused where it is registered; here it only must not fail.
    return token.decode("latin-1")
