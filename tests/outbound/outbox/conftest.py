"""A registered API key, the fake API that accepts it, and an outbox that is sent from in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.outbound.limits import Limits
from receiver.outbound.outbox import Caller, Clients, OutboundRecorder, Outbox
from receiver.outbound.outbox.sending import LaneSender
from receiver.simulator.api import FakeRedoxApi
from receiver.storage.queue import outbox as stored
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec
from tests.outbound.conftest import KEY, LEGACY, PRIVATE

PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
CALLER = Caller(name="tester@test")


@dataclass
class Desk:
    """The outbox and all it needs to send to the fake API, without a worker."""

    engine: Engine
    keyring: Keyring
    api: FakeRedoxApi
    clients: Clients
    recorder: OutboundRecorder = field(init=False)
    owner: str = "worker-1"

    def __post_init__(self) -> None:
        self.recorder = OutboundRecorder(self.engine, self.keyring)

    def add_key(
        self,
        name: str,
        *,
        legacy: bool = False,
        source: str | None = "source-1",
        environment: str = "development",
        replace: bool = False,
        base_url: str | None = None,
    ) -> None:
        """Register an API key that the fake API accepts."""
        key = LEGACY if legacy else OAuthKeySpec(client_id=KEY.client_id, private_key=PEM, kid=KEY.kid)
        ApiKeys(self.engine, self.keyring, actor="tester@test").add_api_key(
            name,
            ApiEndpoint(environment=environment, base_url=base_url or self.api.base_url, source_id=source),
            key,
            datetime.now(UTC),
            replace=replace,
        )

    def outbox(self, caller: Caller = CALLER, **options: Any) -> Outbox:
        """Return the outbox."""
        return Outbox(self.engine, self.keyring, caller=caller, **options)

    def send(self, lane: str = "@outbox/lab/destination-1", *, lease: float = 60, most: int = 1_000) -> bool | None:
        """Send from a lane as a worker does, at most `most` requests. Returns None if the lane cannot be claimed."""
        with self.engine.begin() as connection:
            fence = stored.claim(connection, lane, self.owner, lease)
        if fence is None:
            return None
        left = iter(range(most - 1))
        sender = LaneSender(self.engine, self.clients, self.recorder, name=self.owner)
        try:
            return sender.run(fence, lambda: next(left, None) is not None)
        finally:
            self.execute(
                "UPDATE lanes SET owner = NULL, lease_until = NULL WHERE epoch = :epoch AND owner = :owner",
                epoch=fence.epoch,
                owner=fence.owner,
            )

    def hurry(self) -> None:
        """End all retry times."""
        self.execute("UPDATE outbound_requests SET ready_at = NULL")

    def rows(self, query: str = "SELECT * FROM outbound_requests ORDER BY id", **values: Any) -> list[Any]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(query), values))

    def row(self, uuid: UUID) -> Any:
        """Return a request."""
        return self.rows("SELECT * FROM outbound_requests WHERE uuid = :uuid", uuid=uuid)[0]

    def states(self) -> list[str]:
        """Return the state of each request, oldest first."""
        return [row.state for row in self.rows()]

    def audit(self) -> list[Any]:
        """Return the audit rows of calls, with `detail_json`."""
        return self.rows(
            "SELECT *, detail::jsonb AS detail_json FROM audit_events WHERE action LIKE 'outbound.%' ORDER BY id"
        )

    def execute(self, statement: str, **values: Any) -> None:
        """Execute a statement."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)


@pytest.fixture
def desk(engine: Engine, keyring: Keyring, api: FakeRedoxApi) -> Iterator[Desk]:
    """An outbox with the API key `lab`."""
    with Clients(engine, keyring, limits=Limits(attempts=1)) as clients:
        made = Desk(engine, keyring, api, clients)
        made.add_key("lab")
        yield made
