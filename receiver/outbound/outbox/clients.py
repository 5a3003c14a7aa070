"""Clients of the registered API keys: one client for each key, with its token and connections.

Must not be shared by processes: create it after a fork.
"""

from __future__ import annotations

import ssl
import threading
from types import TracebackType
from typing import Self

from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.outbound.api import ApiProfile
from receiver.outbound.client import RedoxClient
from receiver.outbound.limits import Limits, SlidingWindow
from receiver.protocol.api_keys import ApiKey
from receiver.storage.registry import api_keys
from receiver.storage.registry.api_keys import StoredKey

# Uploads have one path at Redox. Only queries have had two.
UPLOAD_PATH = "/uploads"


class Clients:
    """The clients of one process. Safe in threads.

    All clients share one rate limiter, because Redox counts requests by address. Close it after the last call.
    """

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        limits: Limits | None = None,
        rate: SlidingWindow | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._engine = engine
        self._keyring = keyring
        self._limits = limits or Limits()
        self._ssl_context = ssl_context
        self._rate = rate or SlidingWindow()
        self._lock = threading.Lock()
        self._clients: dict[str, tuple[bytes, bool, RedoxClient]] = {}
        self._replaced: list[RedoxClient] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for client in (*self._replaced, *(client for _, _, client in self._clients.values())):
                client.close()
            self._clients.clear()
            self._replaced.clear()

    def client(self, name: str) -> RedoxClient:
        """Return the client of an API key, as it is registered now.

        Raises NotFound, IntegrityError, ConfigurationError, and SQLAlchemyError if the database does not answer.
        """
        stored = self._stored(name)
        with self._lock:
            version, several, client = self._clients.get(name, (b"", False, None))
            if client is not None and (version, several) == (stored.version, stored.several):
                return client
            if client is not None:
                self._replaced.append(client)  # other threads may be using it
            client = RedoxClient(
                # Called at each renewal of the token, so that a rotated signing key is used.
                lambda: self._key(name),
                base_url=stored.base_url,
                source=stored.source_id,
                rate=self._rate,
                several_keys=stored.several,
                query_path=stored.query_path,
                upload_path=UPLOAD_PATH,
                limits=self._limits,
                ssl_context=self._ssl_context,
            )
            self._clients[name] = (stored.version, stored.several, client)
            return client

    def _stored(self, name: str) -> StoredKey:
        with self._engine.connect() as connection:
            return api_keys.load_api_keys(connection, self._keyring, name)

    def _key(self, name: str) -> ApiKey:
        with self._engine.connect() as connection:
            return api_keys.open_key(connection, self._keyring, name)


def api_profile(stored: StoredKey) -> ApiProfile:
    """Return the ApiProfile of a stored API key."""
    return ApiProfile(
        legacy=stored.legacy,
        source=stored.source_id,
        several_keys=stored.several,
        query_path=stored.query_path,
        upload_path=UPLOAD_PATH,
    )
