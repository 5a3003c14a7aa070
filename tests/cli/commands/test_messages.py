from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, Commands
from tests.cli.test_output import seen_on_a_terminal
from tests.storage.door import Door, body
from tests.storage.hand import arrive

WHY = "register lost Ada, ticket 4711"


class TestList:
    def test_filters_and_pages(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """Filters are columns. A list that was cut says on stderr how to get the next page."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(3)), b"no json")
        assert [each["id"] for each in run.json("messages", "list", "--state", "unhandled")] == numbers[2::-1]
        cut = run("messages", "list", "--limit", "2", "--json")
        assert cut.stderr == f"for more rows, add --before {numbers[2]}\n"
        assert [each["id"] for each in json.loads(cut.stdout)] == numbers[:1:-1]
        rest = run.json("messages", "list", "--limit", "9", "--before", str(numbers[2]))
        assert [each["id"] for each in rest] == numbers[1::-1]
        assert run.json("messages", "list", "--since", "2999-01-01") == []

    def test_keys_are_the_columns(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """--json has every column except those of evidence, times in UTC, and digests in hexadecimal."""
        arrive(door, ledger, body())
        (found,) = run.json("messages", "list")
        assert found.keys() == {
            "id",
            "uuid",
            "destination",
            "credential_ids",
            "source_id",
            "kind",
            "query",
            "test",
            "log_id",
            "attempt_id",
            "message_id",
            "transmission_id",
            "facility",
            "event_time",
            "received_at",
            "peer",
            "size",
            "content_type",
            "state",
            "quarantine_reason",
            "id_conflict",
        }
        assert found["received_at"].endswith("Z")

    def test_a_table(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """An id is shown whole, with control characters escaped."""
        arrive(door, ledger, body(kind="PatientAdmin.Arrival"))
        door.rows("UPDATE messages SET source_id = E'\\x1b[2J\\u202e' || repeat('x', 150)")
        printed = run("messages", "list").stdout
        assert rf"\x1b[2J\u202e{'x' * 150}" in printed
        assert "\x1b" not in printed

    def test_nothing(self, door: Door, run: Commands) -> None:
        """An unknown destination is an error."""
        assert "destination list" in run.fails("messages", "list", "--destination", "nowhere")


class TestShow:
    @pytest.fixture
    def number(self, door: Door, ledger: MessageLedger) -> str:
        """A message that one handler gets."""
        door.enable()
        return str(arrive(door, ledger, body())[0])

    def test_all_but_the_payload(self, number: str, run: Commands) -> None:
        """A message is shown with its deliveries and its audit rows, by id or uuid, without its body."""
        found = run.json("messages", "show", number)
        assert found["payload"] is True
        assert [each["handler"] for each in found["deliveries"]] == ["register"]
        assert [each["action"] for each in found["audit_events"]] == ["message.receive"]
        assert run.json("messages", "show", found["uuid"]) == found
        for printed in (run("messages", "show", number), run("messages", "show", number, "--json")):
            assert "Ada" not in printed.output

    def test_the_payload_is_exact_and_audited(self, number: str, run: Commands) -> None:
        """stdout gets exactly the received bytes; the audit log gets the actor, the message and the reason."""
        done = run("messages", "show", number, "--payload", "--reason", WHY)
        assert done.stdout_bytes == body()
        shown, *_ = run.json("audit", "list", "--action", "message.disclose", "--notes", "--reason", "a review")
        assert (shown["actor"], shown["subject"], shown["note"]) == (ACTOR, f"messages:{number}", WHY)
        assert run.json("messages", "show", number)["audit_events"][0]["action"] == "message.disclose"

    def test_the_payload_to_a_file(self, number: str, run: Commands, tmp_path: Path) -> None:
        """The payload is written to a new file, mode 0600, and not to the terminal."""
        path = tmp_path / "body.json"
        done = run("messages", "show", number, "--payload", "--reason", WHY, "--out", str(path))
        assert path.read_bytes() == body()
        assert path.stat().st_mode & 0o777 == 0o600
        assert done.stdout == ""
        run.fails("messages", "show", number, "--payload", "--reason", WHY, "--out", str(path), status=2)

    @pytest.mark.parametrize(
        "wrong",
        [
            ("--payload",),
            ("--payload", "--reason", " "),
            ("--payload", "--reason", WHY, "--json"),
            ("--reason", WHY),
            ("--out", "x"),
        ],
    )
    def test_never_without_a_reason(self, number: str, run: Commands, wrong: tuple[str, ...]) -> None:
        """Without a reason nothing is shown, and no audit row is written."""
        run.fails("messages", "show", number, *wrong, status=2)
        assert run.json("audit", "list", "--action", "message.disclose") == []

    def test_no_disclosure_without_its_row(self, number: str, run: Commands, door: Door) -> None:
        """If the audit row cannot be written, nothing is shown."""
        door.rows("REVOKE INSERT ON audit_events FROM CURRENT_USER")
        door.rows(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'disk_full'; END $$"
        )
        door.rows("CREATE TRIGGER full_disk BEFORE INSERT ON audit_events EXECUTE FUNCTION full_disk()")
        assert "53100" in run.fails("messages", "show", number, "--payload", "--reason", WHY)

    def test_a_purged_one(self, number: str, run: Commands, door: Door) -> None:
        """The row of a purged message is shown; its payload is an error."""
        door.rows("DELETE FROM payloads")
        assert run.json("messages", "show", number)["payload"] is False
        assert "purged" in run.fails("messages", "show", number, "--payload", "--reason", WHY)

    def test_on_a_terminal_a_body_does_nothing(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """Control characters of a body are escaped on a terminal."""
        (number,) = arrive(door, ledger, b"\x1b]0;owned\x07 no json")
        words = ["messages", "show", str(number), "--payload", "--reason", "x"]
        code = f"from receiver.cli import main; main({words!r})"
        printed = seen_on_a_terminal(code)
        assert r"\x1b]0;owned\x07 no json" in printed
        assert "\x1b]0;" not in printed

    def test_one_that_is_not_there(self, run: Commands) -> None:
        """The error for an unknown message names `messages list`."""
        assert "messages list" in run.fails("messages", "show", "999")
        run.fails("messages", "show", "not-an-id", status=2)


class TestCorrections:
    def test_replay_tells_what_it_did(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """The result gives the number of messages, lanes and new deliveries; the audit log the actor and the reason."""
        arrive(door, ledger, body("1"), body("2"))
        door.enable()
        would = run("messages", "replay", "--destination", "clinic", "--dry-run", "--reason", WHY).stdout
        assert would == "would be replayed: 2 messages in 1 lane, 2 new deliveries\n"
        assert door.value("SELECT count(*) FROM deliveries") == 0
        shown = run.json("messages", "replay", "--destination", "clinic", "--reason", WHY)
        assert (len(shown["done"]), shown["made"], shown["left"], shown["newer"], shown["dry_run"]) == (
            2,
            2,
            [],
            0,
            False,
        )
        rows = run.json("audit", "list", "--action", "message.replay", "--notes", "--reason", "a review")
        assert [(each["actor"], each["note"]) for each in rows] == [(ACTOR, WHY)] * 2

    def test_what_is_left_is_said_and_is_a_failure(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """Rows left unchanged are listed on stderr with the reason, and the exit status is 1; the others are done."""
        one, two = arrive(door, ledger, body("1"), body("2"))
        door.enable()
        door.rows("DELETE FROM payloads WHERE message_id = :id", id=one)
        done = run("messages", "replay", str(one), str(two), "--reason", WHY, status=1)
        assert done.stdout == "replayed: 1 message in 1 lane, 1 new delivery\n"
        assert done.stderr == f"not changed: {one}: its payload is purged: nothing is left to deliver\n"

    def test_many_that_are_left(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """Ten rows are listed, the others counted; --json lists all."""
        arrive(door, ledger, *(body(f"log-{each}") for each in range(12)))
        done = run("messages", "replay", "--destination", "clinic", "--reason", WHY, "--json", status=1)
        assert len(done.stderr.splitlines()) == 11
        assert "2 more" in done.stderr.splitlines()[-1]
        assert len(json.loads(done.stdout)["left"]) == 12

    def test_release_and_discard(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """Messages that are valid now are released; the others stay with a reason, and can be discarded."""
        arrive(door, ledger, body("1", Test=True), b"no json")
        door.enable()
        run("destination", "set", "clinic", "--test-messages", "accept")
        done = run("messages", "release", "--destination", "clinic", "--reason", WHY, status=1)
        assert done.stdout == "released: 1 message in 1 lane, 1 new delivery\n"
        assert "stays in quarantine: not_json" in done.stderr
        shown = run.json("messages", "discard", "--quarantine-reason", "not_json", "--reason", WHY)
        assert len(shown["done"]) == 1
        assert run.json("messages", "list", "--state", "quarantined") == []

    @pytest.mark.parametrize("verb", ["replay", "release", "discard"])
    def test_wrong_usage(self, door: Door, run: Commands, verb: str) -> None:
        """A reason that is not empty and a selection are required."""
        assert "--reason" in run.fails("messages", verb, "1", status=2)
        assert "the reason is empty" in run.fails("messages", verb, "1", "--reason", " ", status=2)
        assert "nothing is selected" in run.fails("messages", verb, "--reason", WHY, status=2)
        assert "messages list" in run.fails("messages", verb, "999", "--reason", WHY)

    def test_an_interruption_says_how_to_go_on(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """After Ctrl-C between batches, the completed ones stand, and the message gives the id to continue after."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        door.enable()
        code = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without it
from receiver.storage.operations.corrections import batches, message_corrections
from receiver.cli import main, output
message_corrections.BODIES = 2
step = batches.AuditedCorrections._batches
def interrupted(self, *arguments):
    for batch in step(self, *arguments):
        yield batch
        os.kill(os.getpid(), signal.SIGINT)
batches.AuditedCorrections._batches = interrupted
main(["messages", "replay", "--destination", "clinic", "--reason", {WHY!r}])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert f"--after {numbers[1]}" in done.stderr
        assert "stopped: 2 messages" in done.stderr
        rest = ("messages", "replay", "--destination", "clinic", "--after", str(numbers[1]), "--reason", WHY)
        assert run.json(*rest)["done"] == numbers[2:]
