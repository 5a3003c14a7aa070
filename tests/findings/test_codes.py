"""Every code of a finding is listed with a line, and something can cause it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from sqlalchemy import Engine, text

import receiver.findings
from receiver import findings
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.queue.handler_problems import HandlerProblem, Kind, report
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import RESTORED, HandlerSpec
from tests.protocol.verification.issuers import RSA_FIRST, jwk

LANE = "register/lab/source:none"


def spec(name: str, role: str = "handler") -> HandlerSpec:
    """A handler or responder of that name."""
    return HandlerSpec(
        handler=name,
        role=role,
        patterns=("*",),
        ordering="source",
        patient_key=None,
        acknowledge="after_commit",
        on_failure="hold",
        max_attempts=3,
        timeout=60.0,
    )


class World:
    """A destination `lab` that lacks nothing, and a receiver that runs; things can be made to happen to them."""

    def __init__(self, engine: Engine, keyring: Keyring, registration: RegistryChanges) -> None:
        self.engine, self._keyring, self.registration = engine, keyring, registration
        self.lab = registration.add_destination(
            "lab",
            datetime.now(UTC),
            environment="production",
            require=["token"],
            sources_policy="registered",
            on_unknown_source="reject",
            test_messages="quarantine",
            reply_with=None,
            token="a-token-of-thirty-two-characters",
        )
        registration.add_source("lab", "s-1", datetime.now(UTC), name=None)
        registration.enable_handler("lab", spec("search", role="responder"), datetime.now(UTC))
        self.listener()

    def listener(self, **more: Any) -> None:
        """A process that listens."""
        self.insert(
            "listeners",
            **{"name": f"{more}", "role": "receiver", "host": "here", "pid": 1, "address": "127.0.0.1:8080", **more},
        )

    def waits(self) -> None:
        """A delivery of `register` has waited for ten minutes, with a worker that has loaded it."""
        self.insert("workers", name="w", host="here", pid=2, handlers=["register"])
        self.delivery(created_at=datetime.now(UTC) - timedelta(minutes=10))

    def sql(self, statement: str, **values: Any) -> None:
        """Run a statement."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def insert(self, table: str, **values: Any) -> None:
        """Insert a row."""
        with self.engine.begin() as connection:
            connection.execute(schema.metadata.tables[table].insert().values(values))

    def audit(self, action: str, **more: Any) -> None:
        """Write an audit row of a request to `lab`."""
        event = AuditEvent(
            **{
                "action": action,
                "outcome": "refused",
                "at": datetime.now(UTC),
                "actor": "redox",
                "destination": "lab",
                **more,
            }
        )
        with self.engine.begin() as connection:
            write(connection, AuditChain(self._keyring, Sealer(self._keyring)), [event])

    def enable(self) -> None:
        """Bind the handler `register`."""
        self.registration.enable_handler("lab", spec("register"), datetime.now(UTC))

    def keys(self, change: str) -> None:
        """Public keys of a URL, in that state."""
        self.registration.add_credential(
            "lab",
            datetime.now(UTC),
            "jwt",
            {"issuers": ["i"], "audiences": ["a"], "jwks_url": "https://keys.example/"},
            None,
            label=None,
            expires_at=None,
            fetched=json.dumps({"keys": [jwk(RSA_FIRST, kid="a")]}).encode(),
        )
        self.sql(f"UPDATE key_sets SET {change}")

    def delivery(self, **more: Any) -> None:
        """A delivery of `register`."""
        self.insert(
            "deliveries",
            **{
                "message_id": 1,
                "received_at": datetime.now(UTC),
                "destination_id": self.lab,
                "handler": "register",
                "inline": False,
                "lane": LANE,
                **more,
            },
        )

    def outbound(self, state: str, **more: Any) -> None:
        """A request to Redox."""
        self.insert(
            "outbound_requests",
            **{
                "uuid": "00000000-0000-4000-8000-000000000001",
                "api_key": "main",
                "lane": "outbox/main",
                "call": "send",
                "kind": "A.B",
                "created_by": "somebody",
                "state": state,
                **more,
            },
        )

    def message(self, **more: Any) -> None:
        """A message."""
        self.insert(
            "messages",
            **{
                "uuid": "00000000-0000-4000-8000-000000000002",
                "destination_id": self.lab,
                "credential_ids": [1],
                "query": False,
                "test": False,
                "received_at": datetime.now(UTC),
                "peer": "192.0.2.1",
                "digest": b"",
                "size": 1,
                "state": "accepted",
                "id_conflict": False,
                "mac": b"",
                "mac_key": "k",
                **more,
            },
        )

    def problem(self, kind: Kind, *, handler: str = "register", process: str = "worker", **more: Any) -> None:
        """A problem that a process reports."""
        with self.engine.begin() as connection:
            report(connection, process, "host", [HandlerProblem(kind=kind, handler=handler, **more)])

    def found(self) -> dict[str, findings.Finding]:
        """The findings, by code."""
        with self.engine.connect() as connection:
            return {each.code: each for each in findings.collect(findings.read(connection, self._keyring))}


@pytest.fixture
def world(engine: Engine, keyring: Keyring, keyring_path: Path, registration: RegistryChanges) -> World:
    """The destination."""
    return World(engine, keyring, registration)


def _source_refused(world: World) -> None:
    world.audit("message.refuse", reason="source_unknown", detail={"status": 403, "source": "s"})


def _sources_refused(world: World) -> None:
    _source_refused(world)
    world.audit("message.receive", outcome="accepted")


def _paused(world: World) -> None:
    world.enable()
    world.registration.pause_handler("register", datetime.now(UTC), destination=None, reason="many_dead")


def _held_since_a_restore(world: World) -> None:
    world.enable()
    world.delivery()
    world.registration.pause_handler("register", datetime.now(UTC), destination=None, reason=RESTORED)


# What causes each finding that is about what the database holds.
SITUATIONS: dict[str, Callable[[World], object]] = {
    "registry_key_missing": lambda world: world.sql("UPDATE destinations SET mac_key = 'mac-0'"),
    "registry_row_changed": lambda world: world.sql("UPDATE destinations SET require = '{}'"),
    "key_set_failing": lambda world: world.keys("failure = 'nobody there'"),
    "key_set_stale": lambda world: world.keys("fetched_at = now() - interval '73 hours'"),
    "no_receiver": lambda world: world.sql("UPDATE listeners SET stopped_at = now()"),
    "receiver_stopped": lambda world: world.listener(host="there", stopped_at=datetime.now(UTC)),
    "admin_stopped": lambda world: world.listener(role="admin", seen_at=datetime.now(UTC) - timedelta(minutes=2)),
    "no_credential": lambda world: world.sql("UPDATE credentials SET revoked_at = now()"),
    "no_source": lambda world: world.sql("UPDATE sources SET enabled = false"),
    "no_handler": lambda world: world.sql("UPDATE subscriptions SET enabled = false"),
    "credential_expires": lambda world: world.registration.add_credential(
        "lab",
        datetime.now(UTC),
        "token",
        {},
        b"another-token-of-32-characters-x",
        expires_at=datetime.now(UTC) + timedelta(days=9),
    ),
    "feed_silent": lambda world: world.sql(
        "UPDATE destinations SET expect_every = 60, created_at = now() - interval '1 hour'"
    ),
    "backlog": World.waits,
    "deliveries_never_tried": World.waits,
    "unhandled": lambda world: world.message(state="unhandled", kind="PatientAdmin.Arrival"),
    "no_worker": World.enable,
    "outbox_pending": lambda world: world.outbound("pending", error_class="Unreachable"),
    "outbox_held": lambda world: world.outbound("held"),
    "outbox_dead": lambda world: world.outbound("dead", error_class="Rejected"),
    "requests_refused": lambda world: world.audit("message.refuse", reason="token_wrong", count=3, actor="unverified"),
    "requests_unavailable": lambda world: world.audit(
        "message.refuse", reason="registry_never_loaded", count=3, destination=None, detail={"status": 503}
    ),
    "destination_unknown": lambda world: world.audit(
        "message.refuse", reason="destination_unknown", count=3, destination=None, detail={"status": 401}
    ),
    "probably_paused": _source_refused,
    "sources_refused": _sources_refused,
    "lane_held": lambda world: world.insert(
        "lanes", lane=LANE, handler="register", destination_id=world.lab, state="held"
    ),
    "handler_paused": _paused,
    "deliveries_held": _held_since_a_restore,
    "handler_not_loaded": World.delivery,
    "plugin_not_loaded": lambda world: world.problem("plugin_not_loaded", detail="it cannot be imported"),
    "handler_not_started": lambda world: world.problem("handler_not_started", detail="it cannot be imported"),
    "handler_failing": lambda world: world.delivery(attempts=2, error_class="KeyError"),
    "responder_missing": lambda world: world.problem("responder_missing", handler="", destination="lab"),
    "responder_failed": lambda world: world.problem("responder_failed", destination="lab", error_class="KeyError"),
    "responder_late": lambda world: world.problem("responder_late", destination="lab"),
    "dead": lambda world: world.delivery(state="dead", error_class="KeyError", finished_at=datetime.now(UTC)),
    "quarantine": lambda world: world.message(state="quarantined", quarantine_reason="not_json"),
}


@pytest.mark.parametrize("code", SITUATIONS)
def test_each_has_a_situation(world: World, code: str) -> None:
    """It is not found before, is found after, and names a command and in `details` the values behind its text."""
    assert code not in world.found()
    SITUATIONS[code](world)
    found = world.found()[code]
    assert found.fix.startswith("redox-receiver ")
    assert found.text.endswith(".")
    assert found.details


def test_rows_of_the_registry_are_named(world: World) -> None:
    """By table, id and destination; a key that is missing by its id; many by how many there are."""
    world.sql("UPDATE destinations SET mac_key = 'mac-0'")
    world.sql("UPDATE credentials SET label = 'x'")
    for source in "abcd":
        world.registration.add_source("lab", source, datetime.now(UTC), name=None)
    world.sql("UPDATE sources SET name = 'x'")
    found = world.found()
    assert f"destinations id {world.lab} of lab is signed with key mac-0" in found["registry_key_missing"].text
    assert "credentials id 1 of lab, sources id 1 of lab, sources id 2 of lab and 3 more are changed" in (
        found["registry_row_changed"].text
    )


@pytest.mark.parametrize(("silent", "unusual"), [("59 minutes", False), ("61 minutes", True)])
def test_an_unusual_silence(world: World, silent: str, unusual: bool) -> None:
    """Without --expect-every, one is unusual that is half as long again as the longest of the last days."""
    # For two days messages came every 10 minutes, but for one silence of 40.
    world.sql(
        f"INSERT INTO feed_activity SELECT {world.lab}, now() - interval '{silent}' - n * interval '10 minutes' "
        "FROM generate_series(0, 288) n WHERE n NOT IN (100, 101, 102)"
    )
    assert ("feed_silent" in world.found()) is unusual
    if unusual:
        assert "lab: no message for 1 h, since " in world.found()["feed_silent"].text
        assert world.found()["feed_silent"].text.endswith("; in 14 days it was never silent for longer than 40 min.")


def test_little_is_known_of_a_new_feed(world: World) -> None:
    """A history of less than a day does not show the nights: no finding."""
    world.sql(
        f"INSERT INTO feed_activity SELECT {world.lab}, now() - n * interval '10 minutes' "
        "FROM generate_series(60, 100) n"
    )
    assert "feed_silent" not in world.found()


def test_a_host_that_serves_another_address_since(world: World) -> None:
    """A receiver that was started anew elsewhere on its host is not missed where it was."""
    world.listener(
        address="127.0.0.1:1",
        started_at=datetime.now(UTC) - timedelta(hours=1),
        stopped_at=datetime.now(UTC) - timedelta(minutes=1),
    )
    assert "receiver_stopped" not in world.found()


def test_a_clock_that_is_wrong(world: World) -> None:
    """This host's clock is compared with the database's."""
    with time_machine.travel(datetime.now(UTC) - timedelta(minutes=10)):
        assert "behind the database's" in world.found()["clock"].text


def test_all_codes_are_listed_and_reachable() -> None:
    """The codes in the source are those of the list, and each is caused by a test of this file."""
    package = Path(receiver.findings.__file__).parent
    strings = {
        node.value
        for path in package.glob("*.py")
        if path.name != "codes.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
    }
    assert findings.CODES.keys() - strings == set()
    assert SITUATIONS.keys() | {"clock"} == findings.CODES.keys()
    assert all(line.endswith(".") for line in findings.CODES.values())


def test_a_code_that_is_not_listed() -> None:
    """It cannot be used."""
    with pytest.raises(KeyError, match="made_up"):
        findings.Finding(code="made_up", text="", fix="")
