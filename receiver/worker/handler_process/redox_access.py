"""What a handler speaks to Redox with: a client whose calls are on record, and the outbox.

May not be imported before a handler asks for either: an HTTP client is much to import for those that never do.
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

# A statement beside the handler's own: none takes that long.
_STATEMENT: Final = 10.0


class RedoxAccess:
    """One handler process's, with connections of its own to the database: what a call was stands, whatever becomes of
    the handler's transaction. Safe in threads.
    """

    def __init__(self, url: str, keyring: Keyring) -> None:
        self._keyring = keyring
        self._engine = open_engine(url, pool_size=2, statement_timeout=_STATEMENT)
        self._clients = Clients(self._engine, keyring, rate=SlidingWindow(load_settings().redox_rate))
        self._recorder = OutboundRecorder(self._engine, keyring)

    def redox(self, handler: str, destination: str, message: str) -> RedoxApi:
        """A client with the key that the destination replies with; `message` (a uuid) is what its calls answer.

        Raises ConfigurationError when the destination has no key.
        """
        return RecordedClient(
            self._clients, self._recorder, self._key(destination), _caller(handler, destination, message)
        )

    def outbox(self, handler: str, destination: str, message: str, connect: Callable[[], Connection]) -> Outbox:
        """The outbox, which writes on what `connect` gives, and sends with that key unless told otherwise."""
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
