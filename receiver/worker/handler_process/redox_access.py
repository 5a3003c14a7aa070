"""Redox access for handlers: a client whose calls are recorded, and the outbox.

Must not be imported before a handler uses either of them: importing the HTTP client is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.outbound.api import RedoxApi
from receiver.outbound.limits import SlidingWindow
from receiver.outbound.outbox import Caller, Clients, OutboundRecorder, Outbox, RecordedClient
from receiver.settings import load_settings
from receiver.storage.registry import api_keys

# Seconds. The limit for a statement outside of the handler's transaction.
_STATEMENT: Final = 10.0


class RedoxAccess:
    """The Redox access of one handler process, with its own database connections.

    The record of a call is kept even if the handler's transaction is rolled back. Safe in threads.
    """

    def __init__(self, url: str, keyring: Keyring) -> None:
        self._keyring = keyring
        self._engine = open_engine(url, pool_size=2, statement_timeout=_STATEMENT)
        self._clients = Clients(self._engine, keyring, rate=SlidingWindow(load_settings().redox_rate))
        self._recorder = OutboundRecorder(self._engine, keyring)

    def redox(self, handler: str, destination: str, message: str) -> RedoxApi:
        """Return a client that uses the destination's reply key. `message` (a uuid) is the message that the calls
        answer.

        Raises ConfigurationError if the destination has no key.
        """
        return RecordedClient(
            self._clients, self._recorder, self._key(destination), _caller(handler, destination, message)
        )

    def outbox(self, handler: str, destination: str, message: str, connect: Callable[[], Connection]) -> Outbox:
        """Return the outbox. It writes on the connection of `connect`, and by default uses the reply key."""
        return Outbox(
            self._engine,
            self._keyring,
            caller=_caller(handler, destination, message),
            key=lambda: self._key(destination),
            connect=connect,
        )

    def _key(self, destination: str) -> str:
        with self._engine.connect() as connection:
            return api_keys.of_destination(connection, self._keyring, destination)


def _caller(handler: str, destination: str, message: str) -> Caller:
    return Caller(name=f"handler:{handler}", destination=destination, message_uuid=UUID(message))
