"""`status` shows whether the feeds flow. Each finding has the command that fixes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from click.testing import CliRunner
from sqlalchemy import Engine, insert, text, update

from receiver.cli import main
from receiver.cli.commands.status import _ago
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import HandlerSpec

Status = Callable[[], dict[str, Any]]
SOURCE = "7ce6f387-c33c-417d-8682-81e83628cbd9"


@pytest.fixture
def lab(
    database_url: str,
    keyring_path: Path,
    engine: Engine,
    registration: RegistryChanges,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """The id of a complete destination `lab`, with a receiver. Commands find its database."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))
    number = registration.add_destination(
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
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="search",
            role="responder",
            patterns=("*",),
            ordering="none",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=1,
            timeout=60.0,
        ),
        datetime.now(UTC),
    )
    with engine.begin() as connection:
        connection.execute(
            insert(schema.listeners).values(name="r", role="receiver", host="here", pid=1, address="127.0.0.1:8080")
        )
    return number


@pytest.fixture
def status() -> Status:
    """Return the document of `status --json`."""

    def run() -> dict[str, Any]:
        done = CliRunner().invoke(main, ["status", "--json"])
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.exit_code == any(each["severity"] == "error" for each in found["findings"]), done.output
        return found

    return run


@pytest.fixture
def happened(engine: Engine, keyring: Keyring) -> Callable[..., None]:
    """Write an audit row of a request to `lab`."""

    def tell(action: str, outcome: str, **more: Any) -> None:
        event = AuditEvent(
            action=action, outcome=outcome, at=datetime.now(UTC), actor="redox", destination="lab", **more
        )
        with engine.begin() as connection:
            write(connection, AuditChain(keyring, Sealer(keyring)), [event])

    return tell


def fixes(found: dict[str, Any]) -> dict[str, str]:
    """Return the command of each finding about the destination."""
    return {each["code"]: each["fix"] for each in found["findings"] if each["destination"] == "lab"}


def line() -> list[str]:
    """Return the first words of the destination's line in the table."""
    message = CliRunner().invoke(main, ["status"]).stdout
    (only,) = (each.split()[:2] for each in message.splitlines() if each.startswith("lab "))
    return only


def delivery(engine: Engine, lab: int, **more: Any) -> None:
    """Insert a delivery of the handler `register`."""
    row = {
        "message_id": 1,
        "destination_id": lab,
        "handler": "register",
        "inline": False,
        "lane": "register/lab/source:none",
        "received_at": datetime.now(UTC),
        **more,
    }
    with engine.begin() as connection:
        connection.execute(insert(schema.deliveries).values(row))


@pytest.mark.usefixtures("lab")
def test_nothing_needs_anybody() -> None:
    """A feed that flows has a line and no finding."""
    assert line() == ["lab", "silent"]
    done = CliRunner().invoke(main, ["status"])
    assert done.exit_code == 0
    assert done.stdout.endswith("\nNo problems found.\n")


@pytest.mark.usefixtures("lab")
def test_a_feed_that_redox_has_paused(status: Status, happened: Callable[..., None]) -> None:
    """An authentic refusal after the last 200 means a pause; the next 200 ends it."""
    happened("message.receive", "accepted")
    happened("message.refuse", "refused", reason="source_unknown", detail={"status": 403, "source": SOURCE})
    assert fixes(status()) == {"probably_paused": "redox-receiver source list lab --refused"}
    assert line() == ["lab", "paused?"]
    happened("message.receive", "accepted")
    assert fixes(status()) == {"sources_refused": "redox-receiver source list lab --refused"}


@pytest.mark.usefixtures("lab")
def test_a_refused_query_pauses_nothing(status: Status, happened: Callable[..., None]) -> None:
    """A refused query does not pause the feed: Redox does not send it again."""
    happened("message.receive", "accepted")
    happened(
        "message.refuse", "refused", reason="source_unknown", detail={"status": 403, "source": SOURCE, "query": True}
    )
    assert fixes(status()) == {"sources_refused": "redox-receiver source list lab --refused"}


@pytest.mark.usefixtures("lab")
def test_a_pause_for_another_reason(status: Status, happened: Callable[..., None]) -> None:
    """The command depends on the reason, here an expired token."""
    happened("message.refuse", "refused", reason="token_expired", detail={"status": 401})
    assert fixes(status()) == {"probably_paused": "redox-receiver credential add lab --kind token"}


def test_work_that_stands(status: Status, engine: Engine, lab: int, registration: RegistryChanges) -> None:
    """Held lanes, paused handlers, handlers that no worker has loaded, and dead deliveries each have a command."""
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="register",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="hold",
            max_attempts=3,
            timeout=60.0,
        ),
        datetime.now(UTC),
    )
    registration.pause_handler("register", datetime.now(UTC), destination=None, reason="many_dead")
    delivery(engine, lab)
    delivery(engine, lab, generation=2, state="dead", error_class="billing.Bug; rm -rf", finished_at=datetime.now(UTC))
    with engine.begin() as connection:
        connection.execute(
            insert(schema.lanes).values(
                lane="register/lab/source:none", handler="register", destination_id=lab, state="held"
            )
        )
    found = status()
    assert [each["code"] for each in found["findings"] if each["destination"] is None] == ["no_worker"]
    assert fixes(found) == {
        "lane_held": "redox-receiver lanes release register/lab/source:none --reason …",
        "handler_paused": "redox-receiver handlers resume register --destination lab",
        "handler_not_loaded": "redox-receiver handlers list",
        "dead": "redox-receiver deliveries list --state dead --handler register --error-class 'billing.Bug; rm -rf'",
    }
    message = CliRunner().invoke(main, ["status"]).stdout
    assert "lab: register is paused (many_dead).\n  redox-receiver handlers resume register" in message
    assert max(map(len, message.splitlines()[:3])) <= 100


@pytest.mark.usefixtures("lab")
def test_a_clock_that_is_wrong(status: Status) -> None:
    """A host's clock that differs from the database's is a finding: the database's decides time limits."""
    with time_machine.travel(datetime.now(UTC) - timedelta(minutes=10)):
        (found,) = status()["findings"]
    assert found["code"] == "clock"
    assert " s behind the database's, which is authoritative" in found["text"]
    assert "use NTP to set the clocks" in found["text"]
    assert found["fix"] == "redox-receiver check"


@pytest.mark.usefixtures("lab")
def test_requests_to_redox_wait_without_a_worker(status: Status, engine: Engine) -> None:
    """Workers send the outbox, so requests in it without a live worker are a finding, even without handlers."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbound_requests (uuid, api_key, lane, call, kind, created_by, state) "
                "VALUES (gen_random_uuid(), 'main', 'outbox/main', 'send', 'A.B', 'somebody', 'pending')"
            )
        )
    assert [each["fix"] for each in status()["findings"]] == ["redox-receiver worker"]


def test_a_disabled_destination(engine: Engine, lab: int) -> None:
    """A destination that is disabled is shown as such."""
    with engine.begin() as connection:
        connection.execute(update(schema.destinations).where(schema.destinations.c.id == lab).values(enabled=False))
    assert line() == ["lab", "disabled"]


def test_what_a_new_destination_lacks(
    status: Status, database_url: str, keyring_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finding names the next missing step: a source, a credential, a handler."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))
    monkeypatch.setenv("RECEIVER_HANDLERS", "receiver.testing.example")

    def run(command: str, *more: str) -> None:
        words = [word for word in command.split()[1:] if word != "…"]
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0, done.output

    run("redox-receiver destination add lab")
    found = fixes(status())
    assert found == {
        "no_source": "redox-receiver source add lab …",
        "no_handler": "redox-receiver handlers enable … --destination lab",
    }
    run(found["no_source"], SOURCE)
    run(found["no_handler"], "example-result")
    assert fixes(status()) == {}
    with engine.connect() as connection:
        number = connection.scalar(text("SELECT id FROM credentials"))
    run(f"redox-receiver credential revoke {number}")
    found = fixes(status())
    assert found == {"no_credential": "redox-receiver credential add lab --kind token"}
    run(found["no_credential"], "--expires", "9d")
    assert fixes(status()) == {"credential_expires": "redox-receiver credential add lab --kind token"}


@pytest.mark.parametrize(
    ("ago", "message"),
    [
        (timedelta(seconds=-3), "0 s ago"),
        (timedelta(seconds=59), "59 s ago"),
        (timedelta(seconds=61), "1 min ago"),
        (timedelta(hours=3, minutes=59), "3 h ago"),
        (timedelta(days=40), "40 d ago"),
    ],
)
def test_ages(ago: timedelta, message: str) -> None:
    """Ages are shown in their largest unit, and never below zero."""
    now = datetime.now(UTC)
    assert _ago(now - ago, now) == message
