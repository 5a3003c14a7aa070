"""The composition root: puts storage, handlers and doors together, as each process needs them.

`public_app` and `admin_app` are what gunicorn calls in each worker, after the fork: threads and sockets survive none.
May not hold a rule: those stand where they belong.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from flask import Flask
from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.errors import ConfigurationError, ReceiverError
from receiver.handlers.hints import Hints
from receiver.handlers.inline import Responders
from receiver.keyring import Keyring
from receiver.outbound.jwks import fetch
from receiver.protocol.message import Once
from receiver.protocol.registry import Registry
from receiver.settings import Settings
from receiver.storage import migrations, registry, schema
from receiver.storage.audit import AuditEvent, network
from receiver.storage.database import describe, open_engine
from receiver.storage.embedded import Cluster
from receiver.storage.key_sets import KeyFetcher
from receiver.storage.ledger import Ledger
from receiver.storage.once import SeenOnce
from receiver.storage.registration import check_keys
from receiver.storage.registry import RegistryFollower
from receiver.web import admin, public
from receiver.web.admin import Check
from receiver.web.door import Answered, Door
from receiver.web.tokens import Issue, Refusal, TokenDoor

log: Final = structlog.get_logger(__name__)

# Seconds after which a host that could not compare its keys with the database's tries again.
_AGAIN: Final = 1.0
# Seconds that a statement beside the ledger's may take.
_PATIENCE: Final = 4.0
# Workers say every few seconds that they live.
_RECENTLY: Final = timedelta(seconds=60)


def database_url(settings: Settings) -> str:
    """DATABASE_URL, or the URL of the embedded PostgreSQL that runs in the data directory.

    Raises ConfigurationError when there is neither: `redox-receiver up` starts it.
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


def public_app() -> Flask:
    """The public application, at work until the process ends.

    A database that is away is no reason not to start: until it is there, everything is answered 503. Raises
    ConfigurationError: a setting, no keyring, or one that is not the database's.
    """
    settings = table.load()
    keyring = keyrings.load(settings.keyring_path)
    url = database_url(settings)
    places = settings.threads // 2
    # One for each who waits for a handler; the others follow the registry, keep leases, tell lanes, compare keys, fetch
    # those of others, and remember what may be used once.
    engine = open_engine(url, pool_size=places + 6, statement_timeout=_PATIENCE)
    hints = Hints(engine)
    ledger = Recorder(engine, keyring, quarantine_quota=settings.quarantine_quota, on_commit=hints.hint)
    follower = RegistryFollower(engine, keyring)
    responders = Responders(settings, url, engine)
    registered = ProvedRegistry(engine, keyring, lambda: follower.current)
    door = Door(registry=registered, ledger=ledger, responders=responders, max_body=settings.max_body, places=places)
    tokens = TokenDoor(registry=registered, records=ledger, network=network)
    fetcher = KeyFetcher(engine, keyring, fetch, every=settings.key_set_refresh)
    for part in (ledger, follower, hints, responders, fetcher):
        part.start()

    def stop() -> None:
        for part in (follower, fetcher, responders, ledger, hints):
            part.stop()
        engine.dispose()

    # Last of all, when the request threads have ended: what they have handed over is written.
    atexit.register(stop)
    return public.public_app(door, trusted_proxies=settings.trusted_proxies, tokens=tokens)


def admin_app() -> Flask:
    """The admin application. Raises ConfigurationError as `public_app` does, but for keys: `/readyz` tells of those."""
    settings = table.load()
    keyring = keyrings.load(settings.keyring_path)
    engine = open_engine(database_url(settings), pool_size=2, statement_timeout=_PATIENCE)
    return admin.admin_app(partial(readiness, engine, keyring))


class Recorder(Ledger):
    """The ledger, with the rows that tell of a query's answer and of tokens, and with what may be used once."""

    def __init__(self, engine: Engine, keyring: Keyring, *, quarantine_quota: int,
                 on_commit: Callable[[Sequence[str]], None]) -> None:
        super().__init__(engine, keyring, quarantine_quota=quarantine_quota, on_commit=on_commit)
        self._seen = SeenOnce(engine)

    def first(self, once: Sequence[Once]) -> bool:
        """Whether none of it was ever seen; from now on all of it was. Raises Unavailable."""
        return self._seen.first(once)

    def issued(self, issue: Issue) -> Future[None]:
        """Write it in the audit; the future is done after the COMMIT, or raises Unavailable."""
        granted = issue.granted
        return self.record(AuditEvent(
            action="token.issue", outcome="issued", at=issue.head.received_at, actor="redox", peer=issue.head.peer,
            destination=issue.destination.name, subject=f"credentials:{granted.credential}",
            detail={"kind": granted.kind, "seconds": granted.expires_in}))

    def not_issued(self, refusal: Refusal) -> None:
        """Note it in the audit; does not wait."""
        denied, known = refusal.denied, refusal.denied.credential
        self.note(AuditEvent(
            action="token.refuse", outcome="refused", at=refusal.head.received_at,
            actor="unverified" if known is None else "redox", reason=denied.reason, peer=refusal.head.peer,
            destination=None if refusal.destination is None else refusal.destination.name,
            subject=None if known is None else f"credentials:{known}", detail={"status": denied.status}))

    def answered(self, answered: Answered) -> Future[None]:
        """Write it in the audit; the future is done after the COMMIT, or raises Unavailable."""
        disclosed = answered.status == 200
        detail: dict[str, Any] = {"status": answered.status, "responder": answered.responder}
        if disclosed:
            detail |= {"length": answered.length, "sha256": answered.sha256.hex()}
        return self.record(AuditEvent(
            action="query.answer", outcome="answered" if disclosed else "failed", at=datetime.now(UTC), actor="redox",
            peer=answered.head.peer, destination=answered.destination.name, message_uuid=UUID(answered.receipt.uuid),
            detail=detail))


class ProvedRegistry:
    """The registry of the moment; None until this host's keys are known to be those of the database.

    With other keys every token would look wrong, and Redox be told 401 for what is a fault of ours. Raises
    ConfigurationError when made on a host whose keys are not the database's.
    """

    def __init__(self, engine: Engine, keyring: Keyring, current: Callable[[], Registry | None]) -> None:
        self._engine = engine
        self._keyring = keyring
        self._current = current
        self._proved = self._prove()
        if not self._proved:
            threading.Thread(target=self._try_again, name="keys", daemon=True).start()

    def __call__(self) -> Registry | None:
        """The registry, or None."""
        return self._current() if self._proved else None

    def _prove(self) -> bool:
        try:
            with self._engine.connect() as connection:
                check_keys(connection, self._keyring)
        except SQLAlchemyError as exc:
            log.warning("keys.not_compared", error=describe(exc))
            return False
        return True

    def _try_again(self) -> None:
        told = None
        while not self._proved:
            time.sleep(_AGAIN)
            try:
                self._proved = self._prove()
            except ConfigurationError as exc:
                # Too late to refuse to start: everything is answered 503, until the database is the right one.
                if str(exc) != told:
                    told = str(exc)
                    log.error("keys.not_proved", error=told)


def readiness(engine: Engine, keyring: Keyring) -> list[Check]:
    """Whether this host can do its work: database, schema, keys and registry; and whether a worker lives.

    The last is told and does not count: a receiver without a worker still keeps every message. Takes as long as the
    database does.
    """
    try:
        with engine.connect() as connection:
            checks = [_database(connection), _schema(connection)]
            if all(check.ok for check in checks):
                checks += [_keys(connection, keyring), _registry(connection, keyring), _worker(connection)]
            return checks
    except SQLAlchemyError as exc:
        return [Check(name="database", ok=False, detail=f"not reachable ({describe(exc)}): see DATABASE_URL")]


def _database(connection: Connection) -> Check:
    reads_only = connection.scalar(text("SELECT current_setting('transaction_read_only')::boolean"))
    return Check(name="database", ok=not reads_only, detail="reachable, and takes writes" if not reads_only else
                 "read-only: DATABASE_URL must name the primary server")


def _schema(connection: Connection) -> Check:
    current, head = migrations.current(connection), migrations.head()
    if current == head:
        return Check(name="schema", ok=True, detail=f"at {head}")
    if current is None or _known(current):
        return Check(name="schema", ok=False,
                     detail=f"at {current or '(none)'}, behind {head}: run `redox-receiver db upgrade`")
    # A newer release has moved it, and this one runs on until it is replaced: schemas stay readable for one release.
    return Check(name="schema", ok=True, detail=f"at {current}, ahead of {head}: install the release that moved it")


def _known(revision: str) -> bool:
    try:
        return ScriptDirectory.from_config(migrations.config()).get_revision(revision) is not None
    except CommandError:
        return False


def _keys(connection: Connection, keyring: Keyring) -> Check:
    try:
        check_keys(connection, keyring)
    except ConfigurationError as exc:
        return Check(name="keys", ok=False, detail=str(exc))
    return Check(name="keys", ok=True, detail=f"{len(keyring.keys)} keys, all of the database's among them")


def _registry(connection: Connection, keyring: Keyring) -> Check:
    try:
        loaded = registry.load(connection, keyring)
    except ReceiverError as exc:
        return Check(name="registry", ok=False, detail=str(exc))
    return Check(name="registry", ok=True, detail=f"version {loaded.version}, {len(loaded.destinations)} destinations")


def _worker(connection: Connection) -> Check:
    silence = connection.scalar(select(func.now() - func.max(schema.workers.c.seen_at)))
    if silence is not None and silence <= _RECENTLY:
        return Check(name="worker", ok=True, detail=f"seen {int(silence.total_seconds())} s ago")
    return Check(name="worker", ok=True,
                 detail="none seen lately: messages are kept, and wait; start `redox-receiver worker`")
