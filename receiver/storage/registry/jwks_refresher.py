"""JWKS refresher: fetches public keys from URLs on a timer, and stores them in the database for every host.

A request never causes a fetch: a token whose key is not stored is refused. If a fetch fails the stored keys stay in use
until they are older than a credential allows.

Must not open connections to a URL: a fetch function is passed in. Start it after fork. Any number of processes may run
it at once; each URL is fetched by one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.errors import ReceiverError, UnknownKey
from receiver.keyring import Keyring
from receiver.protocol.verification.public_keys import MAX_STALE
from receiver.storage.registry.key_sets import KeySetChanges
from receiver.storage.registry.loader import credential_rows, mac_verifies
from receiver.storage.schema import key_sets

log: Final = structlog.get_logger(__name__)

# Seconds between two checks whether a URL is due.
JWKS_POLL_INTERVAL: Final = 5.0

# Only URLs of live credentials. One process claims a URL: for the others it is not due any more.
_CLAIM: Final = """
UPDATE key_sets SET tried_at = now() WHERE id = (
    SELECT k.id FROM key_sets k WHERE k.tried_at < now() - make_interval(secs => %(every)s)
    AND EXISTS (SELECT FROM credentials c WHERE c.settings ->> 'jwks_url' = k.url
                AND (c.revoked_at IS NULL OR c.revoked_at > now())
                AND (c.expires_at IS NULL OR c.expires_at > now()))
    ORDER BY k.tried_at LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING *"""
# The credentials that use the keys of a URL, and the age of those keys.
_FAILING_KEYS: Final = """
SELECT k.url, k.failure, k.fetched_at, extract(epoch FROM now() - k.fetched_at)::float8 AS age,
       t.name AS destination, c.id AS credential, c.kind, c.settings -> 'max_stale' AS max_stale
FROM key_sets k JOIN credentials c ON c.settings ->> 'jwks_url' = k.url JOIN destinations t ON t.id = c.destination_id
WHERE c.revoked_at IS NULL AND (c.expires_at IS NULL OR c.expires_at > now())
ORDER BY k.url, c.id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StaleKeys:
    """Keys of a live credential that are not fetched as they should be. Times by the database's clock.

    `failure`: why the last fetch failed, None when it succeeded. `age`: seconds since the last success. `stale`: older
    than the credential allows, so that its kind is answered 503.
    """

    url: str
    failure: str | None
    fetched_at: datetime
    age: float
    destination: str
    credential: int
    kind: str
    stale: bool


def failing_keys(connection: Connection) -> list[StaleKeys]:
    """Return the live credentials whose last fetch failed, or whose keys are stale."""
    found = []
    for row in connection.exec_driver_sql(_FAILING_KEYS).mappings():
        values = dict(row)
        most = values.pop("max_stale")
        stale = values["age"] >= (most if isinstance(most, int) else MAX_STALE)
        if stale or values["failure"] is not None:
            found.append(StaleKeys(**values, stale=stale))
    return found


class JwksRefresher:
    """Fetches key sets in one process, each every `every` seconds.

    `fetch` returns the content of a URL, or raises a ReceiverError, whose text may be shown.
    """

    def __init__(self, engine: Engine, keyring: Keyring, fetch: Callable[[str], bytes], *, every: float) -> None:
        self._engine = engine
        self._keyring = keyring
        self._registration = KeySetChanges(engine, keyring, actor="redox-receiver")
        self._fetch = fetch
        self._every = every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keys-fetcher", daemon=True)

    def start(self) -> None:
        """Start the thread. Call it after fork."""
        self._thread.start()

    def stop(self) -> None:
        """Stop fetching."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(min(JWKS_POLL_INTERVAL, self._every)):
            try:
                while not self._stopping.is_set() and self.renew_one():
                    pass
            except SQLAlchemyError as exc:
                log.warning("key_set.not_asked", error=describe(exc))
            except Exception as exc:  # noqa: BLE001 - a thread that ends would keep old keys for ever
                log.error("key_set.failed", error=type(exc).__name__)

    def renew_one(self) -> bool:
        """Fetch one key set that is due. Returns whether there was one."""
        with self._engine.begin() as connection:
            taken = connection.exec_driver_sql(_CLAIM, {"every": self._every}).one_or_none()
            if taken is None:
                return False
            number, url = taken.id, taken.url
            # Only a signed row may name a URL: a forged row must not make this host connect anywhere.
            try:
                ours = mac_verifies(key_sets, taken._asdict(), self._keyring) and any(
                    row["settings"].get("jwks_url") == url for row in credential_rows(connection, self._keyring)
                )
            except UnknownKey as exc:
                log.error("key_set.not_proved", id=number, error=str(exc))
                return True
        if not ours:
            log.error("key_set.not_proved", id=number)
            return True
        try:
            document = self._fetch(url)
            changed = self._registration.keys_fetched(url, document, datetime.now(UTC))
        except ReceiverError as exc:
            log.error("key_set.not_fetched", id=number, error=str(exc))
            self._registration.keys_not_fetched(url, str(exc))
        else:
            if changed:
                log.info("key_set.changed", id=number)
        return True
