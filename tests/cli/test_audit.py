from __future__ import annotations

from receiver.storage.ledger import Ledger
from tests.cli.conftest import Commands
from tests.storage.door import Door, body
from tests.storage.hand import arrive


def test_list_by_columns(door: Door, ledger: Ledger, run: Commands) -> None:
    """Newest first, by action, actor and message; the detail is a value."""
    arrive(door, ledger, body(), b"no json")
    found = run.json("audit", "list", "--action", "message", "--reason", "not_json")
    assert [each["outcome"] for each in found] == ["quarantined"]
    assert len(run.json("audit", "list", "--message-uuid", found[0]["message_uuid"])) == 1
    assert found[0]["detail"]["credentials"] == [1]
    assert {each["actor"] for each in run.json("audit", "list")} == {"redox", "tester@test"}
    assert max(map(len, run("audit", "list").stdout.splitlines())) <= 100
    assert run("audit", "list", "--limit", "1").stderr.startswith("more: --before ")


def test_no_evidence_is_printed(door: Door, run: Commands) -> None:
    """Neither MACs nor sealed notes are in a row that is shown."""
    for each in run.json("audit", "list"):
        assert not {"mac", "mac_key", "note", "note_key"} & each.keys()


def test_reasons_are_opened_when_asked_for(door: Door, ledger: Ledger, run: Commands) -> None:
    """--notes shows the reasons that people gave, and nothing where they gave none."""
    number, = arrive(door, ledger, b"no json")
    run("messages", "discard", str(number), "--reason", "a vendor's test")
    assert {each["note"] for each in run.json("audit", "list", "--notes")} == {None, "a vendor's test"}
    assert "vendor" not in run("audit", "list", "--json").stdout
    assert "vendor" in "".join(run("audit", "list", "--notes").stdout.split())


class TestVerify:
    def test_what_was_not_changed_holds(self, door: Door, ledger: Ledger, run: Commands) -> None:
        """All rows are counted, and the exit status is 0; what the command line itself wrote is among them."""
        number, = arrive(door, ledger, b"no json")
        run("messages", "discard", str(number), "--reason", "x")
        found = run.json("audit", "verify", "--payloads")
        assert found["first_bad"] is None
        assert found["rows"] >= 4
        assert found["writers"] == 3
        run("audit", "verify")

    def test_the_first_that_does_not_hold_is_named(self, door: Door, ledger: Ledger, run: Commands) -> None:
        """A message whose row was changed is found: exit status 1, named in the result and on stderr."""
        arrive(door, ledger, body())
        door.rows("UPDATE messages SET kind = 'Results.New'")
        found = run.json("audit", "verify", status=1)
        assert "messages" in found["first_bad"]
        assert found["first_bad"] in run("audit", "verify", status=1).stderr
