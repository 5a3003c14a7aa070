"""The composition root: builds the public application from storage, handlers and web.

Threads and sockets do not survive a fork, so everything is made after it: by receiver.asgi when its lifespan begins, or
by wsgi.py in a WSGI server's process. Must not hold a rule.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from flask import Flask

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.fault_injection import enable
from receiver.public_ledger import PublicLedger
from receiver.server.allocation import large_blocks_apart
from receiver.settings import Settings
from receiver.storage.evidence.flood_control import network
from receiver.storage.queue.heartbeats import Heartbeat
from receiver.storage.registry.follower import RegistryFollower
from receiver.storage.registry.jwks_refresher import JwksRefresher
from receiver.storage.registry.proved_registry import ProvedRegistry
from receiver.web import listening, wsgi
from receiver.web.asgi import PublicService
from receiver.web.endpoint import Endpoint
from receiver.web.token_endpoint import TokenEndpoint
from receiver.worker.handler_process.bootstrap import process_name
from receiver.worker.hints import LaneNotifier
from receiver.worker.inline import InlineHandlers

# Seconds. The limit for a statement other than the ledger's.
STATEMENT_TIMEOUT: Final = 4.0


def database_url(settings: Settings) -> str:
    """DATABASE_URL, or the URL of the embedded PostgreSQL that runs in the data directory.

    Raises ConfigurationError when there is neither: `redox-receiver up` starts it.
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


def public_app() -> Flask:
    """The public Flask application for a WSGI server, started until the process ends. Raises what `compose` raises."""
    listener = compose()
    listener.start()
    # At the very end, after the request threads: what they have handed over is still written.
    atexit.register(listener.stop)
    return listener.flask()


@dataclass(frozen=True, kw_only=True)
class PublicListener:
    """The parts of the public listener, for any server. Call `start` only after fork.

    `now`: the clock for all decisions.
    """

    settings: Settings
    endpoint: Endpoint
    tokens: TokenEndpoint
    start: Callable[[], None]
    stop: Callable[[], None]
    now: Callable[[], datetime]

    def flask(self) -> Flask:
        """The Flask application."""
        return wsgi.public_app(
            self.endpoint, trusted_proxies=self.settings.trusted_proxies, tokens=self.tokens, now=self.now
        )

    def service(self) -> PublicService:
        """Start the service in the running event loop."""
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
    """The public listener, not started yet.

    Without a database it starts all the same, and every reply is 503 until the database is there. Raises
    ConfigurationError: a setting, no keyring, or one that is not the database's.
    """
    large_blocks_apart()
    settings = table.load_settings()
    keyring = keyrings.load_keyring(settings.keyring_path)
    url = database_url(settings)
    enable.enable_faults(url)
    concurrency = settings.threads // 2
    # A connection for each thread that waits for a handler. The others: follow the registry, keep leases, notify lanes,
    # check the schema, fetch public keys, remember nonces.
    engine = open_engine(url, pool_size=concurrency + 7, statement_timeout=STATEMENT_TIMEOUT)
    hints = LaneNotifier(engine)
    responders = InlineHandlers(settings, url, engine)
    ledger = PublicLedger(
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
