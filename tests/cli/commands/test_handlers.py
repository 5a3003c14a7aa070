from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door, body, handler
from tests.storage.hand import arrive

CODE = """
from receiver.handlers import handler, responder

@handler("PatientAdmin.*", name="admissions", ordering="patient", patient_key="MR", timeout=12.3)
def admissions(message, context):
    pass

@responder("PatientSearch.Query", name="search")
def search(message, context):
    return {}

@responder("PatientSearch.Query", name="find")
def find(message, context):
    return {}
"""

Install = Callable[..., None]


def by_name(rows: list[dict[str, object]]) -> dict[object, dict[str, object]]:
    return {row["handler"]: row for row in rows}


def test_what_is_found_is_listed_and_not_imported(door: Door, run: Commands, plugin: Install) -> None:
    """A plugin that is not enabled is listed by its entry points, and not imported."""
    plugin("clinic_code", "raise SystemExit('imported')", "admissions")
    row = by_name(run.json("handlers", "list"))["admissions"]
    assert (row["found"], row["enabled"], row["loaded"], row["destination"]) == (True, False, False, None)
    assert "clinic_code" in str(row["origin"])
    assert "clinic_code" not in sys.modules


def test_enable_binds_it_as_it_is_declared(door: Door, run: Commands, plugin: Install) -> None:
    """The handler's declaration becomes the subscription, with an audit row, and later messages are delivered to it."""
    plugin("clinic_code", CODE, "admissions")
    (bound,) = run.json("handlers", "enable", "admissions", "--destination", "clinic")
    assert (bound["patterns"], bound["ordering"], bound["patient_key"], bound["enabled"]) == (
        ["PatientAdmin.*"],
        "patient",
        "MR",
        True,
    )
    shown, *_ = run.json("audit", "list", "--action", "handler.enable")
    assert (shown["actor"], shown["destination"]) == (ACTOR, "clinic")
    assert by_name(run.json("handlers", "list"))["admissions"]["found"] is True


def test_disable_makes_no_new_deliveries(door: Door, run: Commands, ledger: MessageLedger) -> None:
    """Pending deliveries stay, and new messages get none."""
    door.enable()
    arrive(door, ledger, body("1"))
    assert run.json("handlers", "disable", "register", "--destination", "clinic")[0]["enabled"] is False
    arrive(door, ledger, body("2"))
    assert door.value("SELECT count(*) FROM deliveries") == 1


def test_pause_and_resume(door: Door, run: Commands) -> None:
    """A handler is paused at all destinations or at one; the audit log has the actor."""
    door.enable()
    (paused,) = run.json("handlers", "pause", "register")
    assert paused["pause_reason"] == "operator"
    assert paused["paused_at"] is not None
    assert "register" in run("handlers", "list").stdout
    (resumed,) = run.json("handlers", "resume", "register", "--destination", "clinic")
    assert resumed["paused_at"] is None
    assert [each["actor"] for each in run.json("audit", "list", "--action", "handler", "--limit", "2")] == [ACTOR] * 2


@pytest.mark.parametrize(
    ("command", "fixes"),
    [
        (("enable", "nobody", "--destination", "clinic"), "handlers list"),
        (("disable", "nobody", "--destination", "clinic"), "handlers list"),
        (("pause", "nobody"), "handlers list"),
        (("resume", "nobody", "--destination", "clinic"), "handlers list"),
    ],
)
def test_one_that_is_not_there(door: Door, run: Commands, command: tuple[str, ...], fixes: str) -> None:
    """The error for an unknown handler says where to find the names."""
    assert fixes in run.fails("handlers", *command)


class TestCheck:
    def test_all_is_well(self, door: Door, run: Commands, plugin: Install) -> None:
        """Enabled handlers are imported and listed."""
        plugin("clinic_code", CODE, "admissions", "search")
        assert "no handler is enabled" in run("handlers", "check").stdout
        for name in ("admissions", "search"):
            run("handlers", "enable", name, "--destination", "clinic")
        assert {row["handler"]: row["role"] for row in run.json("handlers", "check")} == {
            "admissions": "handler",
            "search": "responder",
        }

    def test_one_that_is_not_installed(self, door: Door, run: Commands) -> None:
        """An enabled handler that is not installed is reported, with the command that disables it."""
        door.enable()
        assert "handlers disable register --destination clinic" in run("handlers", "check", status=1).stderr

    def test_one_that_cannot_be_imported(self, door: Door, run: Commands, plugin: Install) -> None:
        """A plugin that cannot be imported is reported."""
        plugin("clinic_code", "import nothing_of_that_name", "register")
        door.enable()
        assert "clinic_code" in run("handlers", "check", status=1).stderr

    def test_two_answers_to_one_query(
        self, door: Door, run: Commands, plugin: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two responders for one query at one destination are both reported."""
        plugin("clinic_code", CODE, "find")
        run("handlers", "enable", "find", "--destination", "clinic")
        # `enable` would refuse it: this is a plugin that has come to answer more since.
        door.enable(handler("search", role="responder", patterns=("Results.Query",)))
        monkeypatch.setenv("RECEIVER_HANDLERS", "clinic_code")
        printed = run("handlers", "check", status=1).stderr
        assert "find" in printed
        assert "search" in printed

    def test_without_a_database(self, plugin: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Without a database and a keyring, as in continuous integration, every installed handler is imported.

        Two responders for one query are an error, and an event type that Redox does not document is a warning.
        """
        monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "nothing"))
        monkeypatch.delenv("DATABASE_URL", raising=False)
        run = Commands()
        plugin("clinic_code", CODE.replace("PatientAdmin.*", "PatientAdmin.Arival"), "admissions", "search")
        done = run("handlers", "check")
        assert "admissions" in done.stdout
        assert done.stderr == (
            "warning: admissions: Redox documents no event type PatientAdmin.Arival; did you mean "
            "PatientAdmin.Arrival?\n"
        )
        assert not (tmp_path / "nothing").exists()
        plugin("other_code", CODE, "find")
        assert "PatientSearch.Query is answered by both" in run("handlers", "check", status=1).stderr

    def test_one_of_several(self, door: Door, run: Commands, plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        """`list` reports a module that cannot be imported; other handlers are listed and can be enabled."""
        plugin("clinic_code", CODE, "search")
        monkeypatch.setenv("RECEIVER_HANDLERS", "clinic_code,no_such_code")
        listed = run("handlers", "list")
        assert "admissions" in listed.stdout
        assert "module no_such_code of RECEIVER_HANDLERS cannot be imported" in listed.stderr
        run("handlers", "enable", "search", "--destination", "clinic")


def test_modules_while_developing(door: Door, run: Commands, plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handlers of RECEIVER_HANDLERS are found without an entry point."""
    plugin("clinic_code", CODE)
    monkeypatch.setenv("RECEIVER_HANDLERS", "clinic_code")
    rows = by_name(run.json("handlers", "list"))
    assert rows.keys() == {"admissions", "search", "find"}
    assert all(row["found"] for row in rows.values())
