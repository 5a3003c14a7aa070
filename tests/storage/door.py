"""A destination in a database, and requests that the real pipeline has judged: what a ledger is given.

Not for the rules of judging: those have tests of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.pipeline import Admitted, Challenged, Refused, Verdict, check_head, judge
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import HandlerSpec
from receiver.storage.registry.loader import load_registry
from tests.support.waiting import until

TOKEN = "a token that only tests know"
SOURCE = "11111111-1111-4111-8111-111111111111"
DESTINATION = "clinic"


def body(
    log: str | None = "log-1",
    *,
    outside: str = "Ada",
    kind: str = "PatientAdmin.Arrival",
    source: str = SOURCE,
    **meta: Any,
) -> bytes:
    """Return a message. `log`: its log id, which makes it a duplicate. `outside`: its content outside of Meta."""
    model, _, event = kind.partition(".")
    head: dict[str, Any] = {"DataModel": model, "EventType": event, "Test": False, "Source": {"ID": source}, **meta}
    if log is not None:
        head["Logs"] = [{"ID": log, "AttemptID": f"{log}-attempt"}]
    return json.dumps({"Meta": head, "Patient": {"Identifiers": [{"ID": outside, "IDType": "MR"}]}}).encode()


def handler(name: str = "register", **changes: Any) -> HandlerSpec:
    """A handler of every kind, unless told otherwise."""
    declared: dict[str, Any] = {
        "handler": name,
        "role": "handler",
        "patterns": ("*",),
        "ordering": "source",
        "patient_key": None,
        "acknowledge": "after_commit",
        "on_failure": "dead",
        "max_attempts": 10,
        "timeout": 60.0,
    }
    return HandlerSpec(**declared | changes)


@dataclass
class Door:
    """The destination `clinic` with one source, one token, and no handler yet."""

    engine: Engine
    keyring: Keyring
    registration: RegistryChanges

    def build(self, **changes: Any) -> Door:
        """Register all that."""
        declared: dict[str, Any] = {
            "environment": "production",
            "require": ["token"],
            "sources_policy": "registered",
            "on_unknown_source": "reject",
            "test_messages": "quarantine",
            "reply_with": None,
            "token": TOKEN,
        }
        self.registration.add_destination(DESTINATION, self.now, **declared | changes)
        self.registration.add_source(DESTINATION, SOURCE, self.now, name=None)
        return self

    @property
    def now(self) -> datetime:
        return datetime.now(UTC)

    @property
    def destination(self) -> Destination:
        """It, as it is registered now."""
        with self.engine.connect() as connection:
            return load_registry(connection, self.keyring).destinations[DESTINATION]

    def enable(self, spec: HandlerSpec | None = None) -> None:
        """Bind a handler."""
        self.registration.enable_handler(DESTINATION, spec or handler(), self.now)

    def judge(self, content: bytes, *, token: str = TOKEN, peer: str = "192.0.2.1", **headers: str) -> Verdict:
        """The verdict on a POST of `content`."""
        head = Head(
            destination=DESTINATION,
            method="POST",
            target=f"/redox/{DESTINATION}",
            query="",
            peer=peer,
            headers={"verification-token": token, "content-type": "application/json", **headers},
            received_at=self.now,
        )
        with self.engine.connect() as connection:
            known = load_registry(connection, self.keyring)
        accepted = check_head(head, known, self.now)
        return accepted if isinstance(accepted, Refused) else judge(accepted, content, self.now)

    def admit(self, content: bytes, **request: str) -> Admitted:
        """The verdict, which lets it in."""
        verdict = self.judge(content, **request)
        assert isinstance(verdict, Admitted), verdict
        return verdict

    def refuse(self, content: bytes, **request: str) -> Refused:
        """The verdict, which refuses it."""
        verdict = self.judge(content, **request)
        assert isinstance(verdict, Refused), verdict
        return verdict

    def challenge(self) -> Challenged:
        """The verdict on a handshake."""
        verdict = self.judge(json.dumps({"verification-token": TOKEN, "challenge": "c"}).encode())
        assert isinstance(verdict, Challenged), verdict
        return verdict

    def rows(self, query: str, **values: Any) -> list[Any]:
        """What the database says, or does."""
        with self.engine.begin() as connection:
            result = connection.execute(text(query), values)
            return list(result) if result.returns_rows else []

    def value(self, query: str, **values: Any) -> Any:
        """The first column of the first row."""
        return self.rows(query, **values)[0][0]


@contextmanager
def stalled(door: Door, *ledgers: MessageLedger) -> Iterator[None]:
    """Keep the ledgers' writers waiting while the block runs: what each accepts meanwhile is its next batch.

    For less than the three seconds after which a statement is given up.
    """
    with door.engine.connect() as connection:
        connection.execute(text("LOCK TABLE payloads"))
        plugs = [ledger.accept(door.admit(body(f"plug {time.monotonic()}"))) for ledger in ledgers]
        until(lambda: waiting(door) == len(ledgers), "the writers to wait")
        yield
    for plug in plugs:
        plug.result(10)


def waiting(door: Door) -> int:
    """How many sessions wait for somebody else's lock."""
    return int(
        door.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )
