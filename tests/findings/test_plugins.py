"""Problems of handlers: the same findings in `status`, `check` and `handlers list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine

from receiver.cli import main
from receiver.keyring import Keyring
from receiver.storage.registry.changes import RegistryChanges
from tests.findings.test_codes import World

MESSAGE = "00000000-0000-4000-8000-000000000002"


@pytest.fixture
def world(
    engine: Engine,
    database_url: str,
    keyring: Keyring,
    keyring_path: Path,
    registration: RegistryChanges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    """The destination `lab`, in whose database commands work."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    made = World(engine, keyring, registration)
    made.enable()
    return made


def output_of(*command: str) -> Any:
    """The output of a command with --json."""
    return json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (
            {"kind": "plugin_not_loaded", "detail": "module x cannot be imported: ImportError (x:3)"},
            (
                "register could not be loaded on host: module x cannot be imported: ImportError (x:3). It is treated "
                "as not installed."
            ),
        ),
        (
            {"kind": "handler_not_started", "detail": "it cannot be imported"},
            "register is loaded on host, but its processes do not start: it cannot be imported. Its deliveries wait.",
        ),
        (
            {
                "kind": "responder_failed",
                "destination": "lab",
                "error_class": "KeyError",
                "place": "x:3:answer",
                "count": 3,
            },
            "lab: 3 queries were answered 500 in the last hour: responder register failed (KeyError at x:3:answer).",
        ),
        (
            {"kind": "responder_late", "destination": "lab", "place": "x:3:answer"},
            (
                "lab: 1 query was answered 504 in the last hour: responder register took longer than its timeout at "
                "x:3:answer."
            ),
        ),
        (
            {"kind": "responder_missing", "handler": "", "destination": "lab", "message": UUID(MESSAGE)},
            "lab: 1 query was answered 501 in the last hour: no responder is enabled for PatientSearch.Query.",
        ),
        (
            {"kind": "responder_missing", "destination": "lab", "detail": "it cannot be imported"},
            (
                "lab: 1 query was answered 501 in the last hour: responder register does not run on host: it cannot be "
                "imported."
            ),
        ),
    ],
)
def test_told_alike(world: World, problem: dict[str, Any], text: str) -> None:
    """`status`, `check` and `handlers list` have the same finding, and the sentence names what is wrong."""
    world.message(kind="PatientSearch.Query")
    world.problem(**problem)
    code = problem["kind"]
    assert [each["text"] for each in output_of("status")["findings"] if each["code"] == code] == [text]
    assert [each["message"] for each in output_of("check") if each["name"] == code] == [text]
    listed = CliRunner().invoke(main, ["handlers", "list"])
    assert text in listed.stderr
    if problem.get("handler") != "":
        assert code in listed.stdout


def test_from_the_second_failure_on(world: World) -> None:
    """One failure is chance; the second, of the same delivery or of another, is a finding with class, place and id."""
    world.delivery(attempts=1, error_class="KeyError", error_frames=["x:1:f", "x:3:g"])
    assert "handler_failing" not in world.found()
    world.delivery(message_id=2, attempts=2, started_at="2026-01-01T00:00:00Z", error_class="KeyError")
    finding = world.found()["handler_failing"]
    assert finding.text == "lab: register has failed 2 times on 2 pending deliveries (KeyError at x:3:g)."
    assert finding.fix == "redox-receiver deliveries show 1"
    world.sql("UPDATE deliveries SET state = 'succeeded'")
    assert "handler_failing" not in world.found()


def test_put_off_for_long(world: World) -> None:
    """A handler that has raised RetryLater for more than five minutes is a finding, though no attempt has failed."""
    world.delivery(attempts=0, error_class="RetryLater", deferred_since="2026-01-01T00:00:00Z")
    assert world.found()["handler_failing"].text == (
        "lab: register asks to be retried later on 1 pending delivery (RetryLater)."
    )


def test_what_is_over(world: World) -> None:
    """A process's report replaces its last one, and the report of a silent process no longer counts."""
    world.problem("plugin_not_loaded", detail="x")
    world.problem("handler_not_started", detail="y")
    assert "plugin_not_loaded" not in world.found()
    world.sql("UPDATE handler_problems SET reported_at = now() - interval '2 minutes'")
    assert "handler_not_started" not in world.found()
