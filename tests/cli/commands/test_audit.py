from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, USER, Commands
from tests.storage.door import Door, body
from tests.storage.hand import arrive


def test_list_by_columns(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """Newest first, by action, actor and message; the detail is a value."""
    arrive(door, ledger, body(), b"no json")
    found = run.json("audit", "list", "--action", "message", "--reason", "not_json")
    assert [each["outcome"] for each in found] == ["quarantined"]
    assert len(run.json("audit", "list", "--message-uuid", found[0]["message_uuid"])) == 1
    assert found[0]["detail"]["credentials"] == [1]
    assert {each["actor"] for each in run.json("audit", "list")} == {"redox", "tester@test"}
    assert run("audit", "list", "--limit", "1").stderr.startswith("for more rows, add --before ")


def test_no_evidence_is_printed(door: Door, run: Commands) -> None:
    """Neither MACs nor sealed notes are in a row that is shown."""
    for each in run.json("audit", "list"):
        assert not {"mac", "mac_key", "note", "note_key"} & each.keys()


class TestNotes:
    @pytest.fixture
    def discarded(self, door: Door, ledger: MessageLedger, run: Commands) -> int:
        """A message that somebody discarded, and said why."""
        (number,) = arrive(door, ledger, b"no json")
        run("messages", "discard", str(number), "--reason", "a vendor's test")
        return number

    def test_they_are_opened_for_a_reason(self, discarded: int, run: Commands) -> None:
        """--notes shows the reasons that people gave, and nothing where they gave none; without it none is shown."""
        found = run.json("audit", "list", "--notes", "--reason", "ticket 4711")
        assert {each["note"] for each in found} == {None, "a vendor's test"}
        assert "vendor" not in run("audit", "list", "--json").stdout
        assert "vendor" in run("audit", "list", "--notes", "--reason", "x", "--action", "message.discard").stdout

    def test_never_without_a_reason(self, discarded: int, run: Commands) -> None:
        """Without --reason nothing is opened and nothing written."""
        before = len(run.json("audit", "list"))
        for wrong in ((), ("--reason", " "), ("--reason-code", "not_json")):
            assert "vendor" not in run.fails("audit", "list", "--notes", *wrong, status=2)
        assert len(run.json("audit", "list")) == before

    def test_who_read_them_is_in_the_audit(self, discarded: int, run: Commands) -> None:
        """A row names the reader and which rows were opened; its own reason is sealed, and can be filtered for."""
        found = run.json("audit", "list", "--notes", "--reason", "ticket 4711", "--action", "message")
        opened = [each["id"] for each in found if each["note"]]
        (row,) = run.json("audit", "list", "--action", "audit.disclose")
        assert (row["actor"], row["outcome"], row["noted"]) == (ACTOR, "disclosed", True)
        assert row["reason"] == "break_glass"
        assert run.json("audit", "list", "--reason-code", "break_glass") == [row]
        assert run.json("audit", "list", "--actor", USER, "--action", "audit.disclose") == [row]
        assert run.json("audit", "list", "--actor", USER[:-1]) == []
        assert row["detail"] == {"notes": 1, "first": opened[0], "last": opened[0]}
        assert "4711" not in json.dumps(row)
        again, *_ = run.json("audit", "list", "--action", "audit.disclose", "--notes", "--reason", "review")
        assert again["note"] == "ticket 4711"
        assert run.json("audit", "verify")["first_bad"] is None

    def test_where_nothing_is_sealed_nothing_is_written(self, door: Door, run: Commands) -> None:
        """A list without reasons opens none."""
        run("audit", "list", "--notes", "--reason", "x", "--action", "destination")
        assert run.json("audit", "list", "--action", "audit.disclose") == []

    def test_the_code_is_a_filter_either_way(self, discarded: int, run: Commands) -> None:
        """--reason-code filters with --notes and without; --reason alone is that filter, both together are refused."""
        for given in (
            ("--reason-code", "not_json"),
            ("--reason", "not_json"),
            ("--reason-code", "not_json", "--notes", "--reason", "ticket"),
        ):
            assert {each["reason"] for each in run.json("audit", "list", *given)} == {"not_json"}
        run.fails("audit", "list", "--reason", "a", "--reason-code", "b", status=2)


class TestVerify:
    def test_what_was_not_changed_holds(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """All rows are counted, and the exit status is 0; what the command line itself wrote is among them."""
        (number,) = arrive(door, ledger, b"no json")
        run("messages", "discard", str(number), "--reason", "x")
        found = run.json("audit", "verify", "--payloads")
        assert found["first_bad"] is None
        assert found["rows"] >= 4
        assert found["writers"] == 3
        run("audit", "verify")

    def test_the_first_that_does_not_hold_is_named(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """A message whose row was changed is found: exit status 1, named in the result and on stderr."""
        arrive(door, ledger, body())
        door.rows("UPDATE messages SET kind = 'Results.New'")
        found = run.json("audit", "verify", status=1)
        assert "messages" in found["first_bad"]
        assert found["first_bad"] in run("audit", "verify", status=1).stderr


class TestProofs:
    @pytest.fixture
    def public(self, door: Door, run: Commands, tmp_path: Path) -> Path:
        """The file with the public key, as somebody else has it."""
        path = tmp_path / "seal.pub"
        path.write_text(run("keys", "public").stdout)
        return path

    def elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on there is neither database nor keyring."""
        monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
        monkeypatch.setenv("RECEIVER_KEYRING", "/nowhere")

    def test_a_row_is_proved_without_database_and_keyring(
        self, door: Door, run: Commands, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file and the public key are enough; of another key, or changed, it does not hold."""
        (row,) = run.json("audit", "list", "--action", "destination.add")
        mac = bytes(door.value("SELECT mac FROM audit_events WHERE id = :id", id=row["id"])).hex()
        proof = tmp_path / "row.proof"
        run("audit", "prove", str(row["id"]), "--out", str(proof))
        self.elsewhere(monkeypatch)
        found = run.json("audit", "check-proof", str(proof), "--public-key", str(public))
        assert found["mac"] == mac
        assert found["log"].startswith("redox-receiver/")
        assert found["leaf"] < found["size"]
        proof.write_text(proof.read_text().replace("\nindex ", "\nindex 1"))
        run.fails("audit", "check-proof", str(proof), "--public-key", str(public))
        public.write_text("\n")
        assert "public key is empty" in run.fails("audit", "check-proof", str(proof), "--public-key", str(public))

    def test_a_checkpoint_is_proved_against_a_later_one(
        self, door: Door, run: Commands, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`audit verify` takes the earlier one too, and finds a database in which its rows are no more."""
        kept, proof = tmp_path / "audit.checkpoint", tmp_path / "growth.proof"
        run("audit", "checkpoint", "--out", str(kept))
        assert kept.read_text() == run("audit", "checkpoint").stdout  # nothing came since
        door.enable()
        run("audit", "checkpoint", "--since", str(kept), "--out", str(proof))
        assert run.json("audit", "verify", "--checkpoint", str(kept))["first_bad"] is None
        run("audit", "checkpoint", "--out", str(kept))
        for table in ("audit_seals", "audit_seal_writers"):
            door.rows(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            door.rows(f"DELETE FROM {table}")
        door.rows("DELETE FROM audit_tiles")
        assert run.json("audit", "verify")["first_bad"] is None
        assert "all were deleted" in run.json("audit", "verify", "--checkpoint", str(kept), status=1)["first_bad"]
        self.elsewhere(monkeypatch)
        found = run.json("audit", "check-proof", str(proof), "--public-key", str(public))
        assert found["extends"] < found["size"]

    def test_the_public_key_has_a_name_and_is_not_secret(self, door: Door, run: Commands) -> None:
        """A verifier key of c2sp.org/signed-note, of each key for `seal`."""
        run("keys", "new", "seal")
        found = run.json("keys", "public")
        assert len(found) == 2
        assert [each["public_key"] for each in found] == run("keys", "public").stdout.split()
        for each in found:
            name, _, key = each["public_key"].split("+", 2)
            assert name.startswith("redox-receiver/")
            assert len(base64.b64decode(key)) == 33
