"""The composition root: puts storage, handlers and the web layer together, as each process needs them.

Everything is made after fork, for threads and sockets do not survive one: by receiver.asgi when its lifespan begins, or
by wsgi.py in a WSGI server's process.
Must not hold a rule: those stand where they belong.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from flask import Flask
from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.database import compatibility
from receiver.database.compatibility import SchemaMonitor
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import describe, open_engine
from receiver.errors import ConfigurationError, ReceiverError
from receiver.fault_injection import enable
from receiver.keyring import Keyring
from receiver.protocol.message import Nonce
from receiver.protocol.registry import Registry
from receiver.server.allocation import large_blocks_apart
from receiver.settings import Settings
from receiver.storage import schema
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.accept.replay_guard import ReplayGuard
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.flood_control import network
from receiver.storage.queue.heartbeats import Heartbeat
from receiver.storage.registry import loader
from receiver.storage.registry.follower import RegistryFollower
from receiver.storage.registry.jwks_refresher import JwksRefresher
from receiver.storage.registry.key_records import check_keys
from receiver.web import admin, listening, wsgi
from receiver.web.admin import Check
from receiver.web.asgi import BlockingService, PublicService
from receiver.web.endpoint import Answered, Endpoint
from receiver.web.token_endpoint import TokenEndpoint, TokenIssue, TokenRefusal
from receiver.worker.handler_process.bootstrap import process_name
from receiver.worker.hints import LaneNotifier
from receiver.worker.inline import InlineHandlers

log: Final = structlog.get_logger(__name__)

# Seconds that a statement other than the ledger's may take.
_STATEMENT_TIMEOUT: Final = 4.0
# Why a query was not answered, in the audit.
_UNANSWERED: Final = {500: "responder_failed", 501: "responder_missing", 503: "responders_busy", 504: "responder_late"}
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
    """The public application in Flask for a WSGI server, at work until the process ends. Raises what `compose` does."""
    listener = compose()
    listener.start()
    # Last of all, when the request threads have ended: what they have handed over is written.
    atexit.register(listener.stop)
    return listener.flask()


@dataclass(frozen=True, kw_only=True)
class PublicListener:
    """What the public listener is made of, whichever server serves it. `start` only after fork.

    `now`: the clock by which everything is judged.
    """

    settings: Settings
    endpoint: Endpoint
    tokens: TokenEndpoint
    start: Callable[[], None]
    stop: Callable[[], None]
    now: Callable[[], datetime]

    def flask(self) -> Flask:
        """The application in Flask."""
        return wsgi.public_app(
            self.endpoint, trusted_proxies=self.settings.trusted_proxies, tokens=self.tokens, now=self.now
        )

    def service(self) -> PublicService:
        """Start, for the event loop that runs now."""
        directly = self.settings.server_mode == "asgi"
        service = PublicService(
            flask=self.flask(),
            endpoint=self.endpoint if directly else None,
            tokens=self.tokens if directly else None,
            trusted_proxies=self.settings.trusted_proxies,
            now=self.now,
            threads=self.settings.threads,
            ready=lambda: self.endpoint.registry() is not None,
            stop=self.stop,
        )
        self.start()
        return service


def compose() -> PublicListener:
    """The public listener, not yet at work.

    A database that is away does not stop the start: until it is there, everything is answered 503. Raises
    ConfigurationError: a setting, no keyring, or one that is not the database's.
    """
    large_blocks_apart()
    settings = table.load_settings()
    keyring = keyrings.load_keyring(settings.keyring_path)
    url = database_url(settings)
    enable.enable_faults(url)
    concurrency = settings.threads // 2
    # One for each who waits for a handler; the others follow the registry, keep leases, tell lanes, watch the schema,
    # fetch the keys of others, and remember what may be used once.
    engine = open_engine(url, pool_size=concurrency + 7, statement_timeout=_STATEMENT_TIMEOUT)
    hints = LaneNotifier(engine)
    responders = InlineHandlers(settings, url, engine)
    ledger = Recorder(
        engine,
        keyring,
        quarantine_quota=settings.quarantine_quota,
        on_commit=hints.hint,
        no_responder=responders.no_responder,
    )
    follower = RegistryFollower(engine, keyring)
    registered = ProvedRegistry(engine, keyring, follower)
    heartbeat = Heartbeat(
        engine, keyring, name=process_name(), role="receiver", address=listening.address(settings.bind)
    )
    fetcher = JwksRefresher(engine, keyring, _fetch, every=settings.key_set_refresh)

    def start() -> None:
        for part in (ledger, follower, registered, hints, responders, fetcher, heartbeat):
            part.start()

    def stop() -> None:
        for part in (heartbeat, registered, follower, fetcher, responders, ledger, hints):
            part.stop()
        engine.dispose()

    return PublicListener(
        settings=settings,
        start=start,
        stop=stop,
        endpoint=Endpoint(
            registry=registered,
            ledger=ledger,
            responders=responders,
            max_body=settings.max_body,
            concurrency=concurrency,
        ),
        tokens=TokenEndpoint(registry=registered, records=ledger, network=network),
        now=follower.clock.now,
    )


def _fetch(url: str) -> bytes:
    """Fetch public keys from a URL. The HTTP client is imported only here: it takes megabytes."""
    from receiver.outbound.jwks import fetch

    return fetch(url)


def admin_service() -> BlockingService:
    """The admin listener, for the event loop that runs now. Raises ConfigurationError as `compose` does, but for keys:
    `/readyz` tells of those.
    """
    settings = table.load_settings()
    keyring = keyrings.load_keyring(settings.keyring_path)
    url = database_url(settings)
    enable.enable_faults(url)
    engine = open_engine(url, pool_size=3, statement_timeout=_STATEMENT_TIMEOUT)
    heartbeat = Heartbeat(
        engine, keyring, name=process_name(), role="admin", address=listening.address(settings.admin_bind)
    )
    heartbeat.start()

    def stop() -> None:
        heartbeat.stop()
        engine.dispose()

    return BlockingService(admin.admin_app(partial(readiness, engine, keyring)), threads=settings.threads, stop=stop)


class Recorder(MessageLedger):
    """The ledger, with the rows that tell of a query's answer and of tokens, and with what may be used once."""

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        quarantine_quota: int,
        on_commit: Callable[[Sequence[str]], None],
        no_responder: Callable[[str, str], None] = lambda _destination, _uuid: None,
    ) -> None:
        super().__init__(engine, keyring, quarantine_quota=quarantine_quota, on_commit=on_commit)
        self._seen = ReplayGuard(engine)
        self._no_responder = no_responder

    def first(self, once: Sequence[Nonce]) -> bool:
        """Whether none of it was ever seen; from now on all of it was. Raises Unavailable."""
        return self._seen.first(once)

    def issued(self, issue: TokenIssue) -> Future[None]:
        """Write it in the audit; the future is done after the COMMIT, or raises Unavailable."""
        granted = issue.granted
        return self.record(
            AuditEvent(
                action="token.issue",
                outcome="issued",
                at=issue.head.received_at,
                actor="redox",
                peer=issue.head.peer,
                destination=issue.destination.name,
                subject=f"credentials:{granted.credential}",
                detail={"kind": granted.kind, "seconds": granted.expires_in},
            )
        )

    def not_issued(self, refusal: TokenRefusal) -> None:
        """Note it in the audit; does not wait."""
        denied, known = refusal.denied, refusal.denied.credential
        self.note(
            AuditEvent(
                action="token.refuse",
                outcome="refused",
                at=refusal.head.received_at,
                actor="unverified" if known is None else "redox",
                reason=denied.reason,
                peer=refusal.head.peer,
                destination=None if refusal.destination is None else refusal.destination.name,
                subject=None if known is None else f"credentials:{known}",
                detail={"status": denied.status},
            )
        )

    def answered(self, answered: Answered) -> Future[None]:
        """Write it in the audit; the future is done after the COMMIT, or raises Unavailable.

        What discloses nothing is noted, and nobody waits.
        """
        disclosed = answered.status == 200
        if answered.responder is None:
            self._no_responder(answered.destination.name, answered.receipt.uuid)
        detail: dict[str, Any] = {"status": answered.status, "responder": answered.responder}
        if disclosed:
            detail |= {"length": answered.length, "sha256": answered.sha256.hex()}
        event = AuditEvent(
            action="query.answer",
            outcome="answered" if disclosed else "failed",
            at=datetime.now(UTC),
            actor="redox",
            reason=_UNANSWERED.get(answered.status),
            peer=answered.head.peer,
            destination=answered.destination.name,
            message_uuid=UUID(answered.receipt.uuid),
            detail=detail,
        )
        if disclosed:
            return self.record(event)
        self.note(event)
        noted: Future[None] = Future()
        noted.set_result(None)
        return noted


class ProvedRegistry:
    """The registry of the moment; None while the schema is one that this code does not run on, and while this host is
    not known to hold the database's keys.

    Without them every token would look wrong, and Redox be answered 401 for a fault of ours. Raises
    ConfigurationError when made on a host whose keys are not the database's.
    """

    def __init__(self, engine: Engine, keyring: Keyring, follower: RegistryFollower) -> None:
        self._engine = engine
        self._keyring = keyring
        self._follower = follower
        self._schema = SchemaMonitor(engine)
        self._proved = self._fits = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="schema", daemon=True)
        self._look()

    def __call__(self) -> Registry | None:
        """The registry, or None."""
        if not (self._proved and self._fits) or self._follower.doubt is not None:
            return None
        return self._follower.current

    def start(self) -> None:
        """Go on looking. Only after fork."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; what is being asked right now is waited for a little."""
        self._stopping.set()
        self._thread.join(compatibility.SCHEMA_POLL_INTERVAL)

    def _look(self) -> None:
        found = self._schema.check()
        if found is not None:  # else it is away, and everything stays as it was last known
            self._fits = found.compatible
        if found is not None and found.compatible and not self._proved:
            self._proved = self._prove()

    def _prove(self) -> bool:
        try:
            with self._engine.connect() as connection:
                check_keys(connection, self._keyring)
        except SQLAlchemyError as exc:
            log.warning("keys.not_compared", error=describe(exc))
            return False
        return True

    def _watch(self) -> None:
        reported = None
        while not self._stopping.wait(compatibility.SCHEMA_POLL_INTERVAL):
            try:
                self._look()
            except ConfigurationError as exc:
                # Too late to refuse to start: everything is answered 503, until the database is the right one.
                if str(exc) != reported:
                    reported = str(exc)
                    log.error("keys.not_proved", error=reported)
            except Exception as exc:  # noqa: BLE001 - a thread that ends would keep what it knew last for ever
                log.error("schema.not_watched", error=type(exc).__name__)


def readiness(engine: Engine, keyring: Keyring) -> list[Check]:
    """Whether this host can do its work: database, schema, keys and registry; and whether a worker lives.

    The last is reported and does not count: a receiver without a worker still keeps every message. Takes as long as the
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
    return Check(
        name="database",
        ok=not reads_only,
        detail="reachable, and takes writes"
        if not reads_only
        else "read-only: DATABASE_URL must name the primary server",
    )


def _schema(connection: Connection) -> Check:
    found = compatibility.schema_compatibility(connection)
    return Check(name="schema", ok=found.compatible, detail=found.message)


def _keys(connection: Connection, keyring: Keyring) -> Check:
    try:
        check_keys(connection, keyring)
    except ConfigurationError as exc:
        return Check(name="keys", ok=False, detail=str(exc))
    return Check(name="keys", ok=True, detail=f"{len(keyring.keys)} keys, all of the database's among them")


def _registry(connection: Connection, keyring: Keyring) -> Check:
    try:
        loaded = loader.load_registry(connection, keyring)
    except ReceiverError as exc:
        return Check(name="registry", ok=False, detail=str(exc))
    return Check(name="registry", ok=True, detail=f"version {loaded.version}, {len(loaded.destinations)} destinations")


def _worker(connection: Connection) -> Check:
    silence = connection.scalar(select(func.now() - func.max(schema.workers.c.seen_at)))
    if silence is not None and silence <= _RECENTLY:
        return Check(name="worker", ok=True, detail=f"seen {int(silence.total_seconds())} s ago")
    return Check(
        name="worker", ok=True, detail="none seen lately: messages are kept, and wait; start `redox-receiver worker`"
    )
