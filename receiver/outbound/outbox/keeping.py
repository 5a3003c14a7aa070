"""`Outbox`: calls to Redox written down in the caller's transaction, and made by a worker after its commit.

May not speak to Redox. What Redox would refuse is refused here, before it is written down.
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
    """Keeps calls until they are made. Safe in threads as far as the connections given to it are.

    `key` names the API key where a call does not; with a `key` that is a function, it is asked when it is first needed.
    `connect` gives the connection that calls are written on where none is passed; without it each is written in a
    transaction of its own. Times and states of what was written: `redox-receiver outbox list`.

    All methods return the uuid that the request is kept under. They raise Unsendable for what Redox would refuse,
    NotFound and ConfigurationError for a key that is not there or cannot be used.
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
        """Have a Data Model message sent. It names one destination, for order is kept for each."""
        return self._message(message, False, key, connection, onramp)

    def query(
        self,
        message: Outgoing,
        *,
        key: str | None = None,
        connection: Connection | None = None,
        onramp: NetworkOnramp | None = None,
    ) -> UUID:
        """Have a query made; `answer` returns what came of it."""
        return self._message(message, True, key, connection, onramp)

    def fhir(
        self,
        destination: str,
        environment: Environment,
        *,
        key: str | None = None,
        connection: Connection | None = None,
    ) -> FhirDestination[UUID]:
        """Have FHIR operations carried out: `outbox.fhir(slug, "Production").message("Patient", "$patient-update", …)`.

        Raises Unsendable with a legacy key.
        """
        name, speaks = self._speaker(key)
        return speaks.fhir(destination, environment, lambda call: self._keep(call, name, connection))

    def answer(self, uuid: UUID) -> bytes | None:
        """The body of Redox's answer; None as long as there is none. Raises IntegrityError."""
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
        name, speaks = self._speaker(key)
        return self._keep(speaks.message(message, query=query, onramp=onramp), name, connection)

    def _speaker(self, key: str | None) -> tuple[str, ApiProfile]:
        name = key or (self._key() if callable(self._key) else self._key)
        with self._engine.connect() as connection:
            if name is None:
                name = api_keys.only_one(connection)
            return name, api_profile(api_keys.load_api_keys(connection, self._keyring, name))

    def _keep(self, call: Call, key: str, connection: Connection | None) -> UUID:
        if len(call.to) != 1:
            raise Unsendable("the outbox keeps order for each destination: give it one message for each")
        if call.body is not None and len(call.body) > self._most:
            raise Unsendable(f"the message has {len(call.body)} bytes, and Redox takes {self._most} at most")
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
