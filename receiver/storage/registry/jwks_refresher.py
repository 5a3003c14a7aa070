"""Renews the public keys that are fetched from a URL, on a timer; kept in the database, so that every host has them.

Nothing in a request makes anybody fetch: a token of a key that is not here is refused, and that is all. When a fetch
fails the keys stay as they are, until they are older than a credential allows. Must not fetch by itself: how is given
to it. Started after fork, by whoever composes the process; any number of processes may do this at once, and one of them
fetches.
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
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.loader import credential_rows, verified_rows
from receiver.storage.schema import key_sets

log: Final = structlog.get_logger(__name__)

# How often it is looked whether one is due.
JWKS_POLL_INTERVAL: Final = 5.0

# Only what a live credential names. Taken by one process: for the others it is not due any more.
_TAKE: Final = """
UPDATE key_sets SET tried_at = now() WHERE id = (
    SELECT k.id FROM key_sets k WHERE k.tried_at < now() - make_interval(secs => %(every)s)
    AND EXISTS (SELECT FROM credentials c WHERE c.settings ->> 'jwks_url' = k.url
                AND (c.revoked_at IS NULL OR c.revoked_at > now())
                AND (c.expires_at IS NULL OR c.expires_at > now()))
    ORDER BY k.tried_at LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING *"""
# Who uses the keys of a URL, and how old those are.
_TROUBLES: Final = """
SELECT k.url, k.failure, k.fetched_at, extract(epoch FROM now() - k.fetched_at)::float8 AS age,
       t.name AS destination, c.id AS credential, c.kind, c.settings -> 'max_stale' AS max_stale
FROM key_sets k JOIN credentials c ON c.settings ->> 'jwks_url' = k.url JOIN destinations t ON t.id = c.destination_id
WHERE c.revoked_at IS NULL AND (c.expires_at IS NULL OR c.expires_at > now())
ORDER BY k.url, c.id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StaleKeys:
    """Keys of a live credential that are not fetched as they should be. Times by the database's clock.

    `failure`: why the last fetch failed, None when it did not. `age`: seconds since the last that succeeded. `stale`:
    older than the credential allows, so that its kind is answered 503.
    """

    url: str
    failure: str | None
    fetched_at: datetime
    age: float
    destination: str
    credential: int
    kind: str
    stale: bool


def troubles(connection: Connection) -> list[StaleKeys]:
    """The live credentials whose keys could not be fetched lately, or are stale."""
    found = []
    for row in connection.exec_driver_sql(_TROUBLES).mappings():
        values = dict(row)
        most = values.pop("max_stale")
        stale = values["age"] >= (most if isinstance(most, int) else MAX_STALE)
        if stale or values["failure"] is not None:
            found.append(StaleKeys(**values, stale=stale))
    return found


class JwksRefresher:
    """Keeps key sets fresh in one process, each `every` seconds.

    `fetch` gives what a URL holds, and raises an error of ours, whose text may be shown.
    """

    def __init__(self, engine: Engine, keyring: Keyring, fetch: Callable[[str], bytes], *, every: float) -> None:
        self._engine = engine
        self._keyring = keyring
        self._registration = RegistryChanges(engine, keyring, actor="redox-receiver")
        self._fetch = fetch
        self._every = every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keys-fetcher", daemon=True)

    def start(self) -> None:
        """Begin. Only after fork."""
        self._thread.start()

    def stop(self) -> None:
        """Fetch nothing more."""
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
        """Renew a key set that is due; whether there was one."""
        with self._engine.begin() as connection:
            taken = connection.exec_driver_sql(_TAKE, {"every": self._every}).one_or_none()
            if taken is None:
                return False
            number, url = taken.id, taken.url
            # Where we fetch from is ours to say: a row that somebody else wrote must not make this host ask anywhere.
            try:
                ours = verified_rows(key_sets, taken._asdict(), self._keyring) and any(
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
