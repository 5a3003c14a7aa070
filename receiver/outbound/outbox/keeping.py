"""`Outbox`: stores calls to Redox in the caller's transaction. A worker sends them after the commit.

Must not send anything to Redox. A call that Redox would reject is refused here, before it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from sqlalchemy import Connection, Engine

from receiver.keyring import Keyring
from receiver.outbound.api import ApiProfile
from receiver.outbound.calls import Call
from receiver.outbound.errors import Unsendable
from receiver.outbound.fhir import Environment, FhirDestination
from receiver.outbound.limits import Limits
from receiver.outbound.messages import NetworkOnramp, Outgoing
from receiver.outbound.outbox.bodies import Bodies
from receiver.outbound.outbox.clients import api_profile
from receiver.outbound.outbox.recording import Caller
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.identifiers import uuid7
from receiver.storage.queue import outbox
from receiver.storage.queue.outbox import NewRequest
from receiver.storage.registry import api_keys


class Outbox:
    """Stores calls until they are sent. Safe in threads if the connections passed to it are.

    `key`: the name of the API key for calls without one, or a function that returns it, called at first use. `connect`:
    returns the connection on which calls are stored if none is passed; without `connect`, each call is stored in its
    own transaction. To see the times and states of stored calls, run `redox-receiver outbox list`.

    All methods return the uuid of the stored request. They raise Unsendable if Redox would reject the call, and
    NotFound or ConfigurationError if the key does not exist or cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        caller: Caller,
        key: str | Callable[[], str] | None = None,
        connect: Callable[[], Connection] | None = None,
    ) -> None:
        self._engine = engine
        self._keyring = keyring
        self._bodies = Bodies(Sealer(keyring))
        self._caller = caller
        self._key = key
        self._connect = connect
        self._most = Limits().request_bytes

    def send(
        self,
        message: Outgoing,
        *,
        key: str | None = None,
        connection: Connection | None = None,
        onramp: NetworkOnramp | None = None,
    ) -> UUID:
        """Store a Data Model message to send. It must have one destination, because order is kept by destination."""
        return self._message(message, False, key, connection, onramp)

    def query(
        self,
        message: Outgoing,
        *,
        key: str | None = None,
        connection: Connection | None = None,
        onramp: NetworkOnramp | None = None,
    ) -> UUID:
        """Store a query to send. `answer` returns its result."""
        return self._message(message, True, key, connection, onramp)

    def fhir(
        self,
        destination: str,
        environment: Environment,
        *,
        key: str | None = None,
        connection: Connection | None = None,
    ) -> FhirDestination[UUID]:
        """Return the FHIR operations to store: `outbox.fhir(slug, "Production").message("Patient", "$patient-update",
        …)`.

        Raises Unsendable for a legacy key.
        """
        name, profile = self._profile_of(key)
        return profile.fhir(destination, environment, lambda call: self._keep(call, name, connection))

    def answer(self, uuid: UUID) -> bytes | None:
        """Return the body of Redox's response, or None if there is no response yet. Raises IntegrityError."""
        with self._engine.connect() as connection:
            found = outbox.answer(connection, uuid)
        return None if found is None else self._bodies.open_answer(*found, uuid)

    def _message(
        self,
        message: Outgoing,
        query: bool,
        key: str | None,
        connection: Connection | None,
        onramp: NetworkOnramp | None,
    ) -> UUID:
        name, profile = self._profile_of(key)
        return self._keep(profile.message(message, query=query, onramp=onramp), name, connection)

    def _profile_of(self, key: str | None) -> tuple[str, ApiProfile]:
        name = key or (self._key() if callable(self._key) else self._key)
        with self._engine.connect() as connection:
            if name is None:
                name = api_keys.only_one(connection)
            return name, api_profile(api_keys.load_api_keys(connection, self._keyring, name))

    def _keep(self, call: Call, key: str, connection: Connection | None) -> UUID:
        if len(call.to) != 1:
            raise Unsendable("the message has several destinations: pass one message for each destination")
        if call.body is not None and len(call.body) > self._most:
            raise Unsendable(f"the message has {len(call.body)} bytes: Redox accepts at most {self._most}")
        uuid = uuid7()
        key_id, sealed = self._bodies.seal_call(call, uuid, key)
        new = NewRequest(
            uuid=uuid,
            api_key=key,
            lane=outbox.lane(key, call.to[0]),
            call=call.name,
            kind=call.kind,
            message_uuid=self._caller.message_uuid,
            destination=self._caller.destination,
            created_by=self._caller.name,
            request_key=key_id,
            request=sealed,
        )
        with self._writing(connection) as writable:
            outbox.put(writable, new)
        return uuid

    @contextmanager
    def _writing(self, connection: Connection | None) -> Iterator[Connection]:
        given = connection if connection is not None or self._connect is None else self._connect()
        if given is not None:
            yield given
        else:
            with self._engine.begin() as own:
                yield own
