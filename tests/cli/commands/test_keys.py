from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from receiver import keyring as keyrings
from receiver.keyring import PURPOSES
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door


@pytest.fixture
def place(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path for the keyring of a database that has none."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data" / "keyring.json"


class TestInit:
    def test_a_key_of_each_purpose(self, place: Path) -> None:
        """`keys init` writes a file for its owner alone, records the fingerprints, and the audit names the actor."""
        run = Commands()
        made = run.json("keys", "init")
        assert [each["purpose"] for each in made] == list(PURPOSES)
        assert place.stat().st_mode & 0o777 == 0o600
        assert all(each["recorded"] and each["held"] and each["current"] for each in run.json("keys", "list"))
        assert {each["actor"] for each in run.json("audit", "list", "--action", "key.new")} == {ACTOR}
        assert run.json("audit", "verify")["first_bad"] is None

    def test_never_a_second_one(self, place: Path) -> None:
        """An existing keyring is never replaced."""
        run = Commands()
        run("keys", "init")
        before = place.read_bytes()
        assert "keys list" in run.fails("keys", "init")
        assert place.read_bytes() == before

    def test_not_for_a_database_that_has_one(self, place: Path) -> None:
        """A database that has keys gets no new keyring: it needs its own back."""
        run = Commands()
        run("keys", "init")
        place.unlink()
        assert "restore" in run.fails("keys", "init")
        assert not place.exists()

    def test_one_of_two_at_once(self, place: Path) -> None:
        """If two hosts create a keyring at once, one succeeds and the other is refused."""
        code = "from receiver.cli import main; main(['keys', 'init'])"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, "RECEIVER_KEYRING": str(place.with_name(f"{each}.json"))},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for each in range(2)
        ]
        assert sorted(each.wait(60) for each in started) == [0, 1]
        assert len(list(place.parent.glob("*.json"))) == 1


class TestNew:
    def test_a_new_key_is_pending(self, run: Commands, keyring_path: Path) -> None:
        """Nothing is written with it yet; the older keys stay, and the command says what to do next."""
        old = keyrings.load_keyring(keyring_path)
        done = run("keys", "new", "payload", "--json")
        new = json.loads(done.stdout)
        ring = keyrings.load_keyring(keyring_path)
        assert ring.current("payload") == old.current("payload")
        assert ring[new["id"]].pending
        assert [key.secret for key in ring.keys[:-1]] == [key.secret for key in old.keys]
        assert "every other host" in done.stderr
        assert f"keys activate {new['id']}" in done.stderr
        listed = [each for each in run.json("keys", "list") if each["purpose"] == "payload"]
        assert [(each["stage"], each["current"]) for each in listed] == [("active", True), ("pending", False)]
        row, *_ = run.json("audit", "list", "--action", "key.new")
        assert (row["actor"], row["subject"]) == (ACTOR, f"keys:{new['id']}")
        assert run.json("audit", "verify")["first_bad"] is None

    def test_there_is_one_index_key_for_good(self, run: Commands, keyring_path: Path) -> None:
        """A second index key is refused: stored digests could not be computed with it."""
        before = keyring_path.read_bytes()
        assert "index" in run.fails("keys", "new", "index")
        run.fails("keys", "new", "magic", status=2)
        assert keyring_path.read_bytes() == before

    def test_a_key_that_is_not_recorded_is_not_kept(self, run: Commands, keyring_path: Path, door: Door) -> None:
        """When the database does not store the fingerprint, the file stays as it was."""
        door.rows(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'disk_full'; END $$"
        )
        door.rows(
            "CREATE CONSTRAINT TRIGGER full_disk AFTER INSERT ON keys DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )
        before = keyrings.load_keyring(keyring_path)
        run.fails("keys", "new", "mac")
        assert [key.id for key in keyrings.load_keyring(keyring_path).keys] == [key.id for key in before.keys]


class TestActivate:
    def test_rows_are_written_with_it(self, run: Commands, keyring_path: Path, door: Door) -> None:
        """The next change of the registry is signed with the new key; rows under the old key still verify."""
        new = run.json("keys", "new", "mac")["id"]
        run("source", "add", "clinic", "11111111-1111-4111-8111-111111111111")
        assert new not in {row.mac_key for row in door.rows("SELECT mac_key FROM sources")}
        assert run.json("keys", "activate", new)["stage"] == "active"
        run("source", "add", "clinic", "22222222-2222-4222-8222-222222222222")
        assert new in {row.mac_key for row in door.rows("SELECT mac_key FROM sources")}
        assert not keyrings.load_keyring(keyring_path)[new].pending
        assert run.json("audit", "verify")["first_bad"] is None
        row, *_ = run.json("audit", "list", "--action", "key.activate")
        assert (row["actor"], row["subject"]) == (ACTOR, f"keys:{new}")

    def test_not_before_every_process_holds_it(self, run: Commands, door: Door) -> None:
        """A receiver or a worker that lacks the key is named; one that stopped long ago does not count."""
        new = run.json("keys", "new", "payload")["id"]
        door.rows(
            "INSERT INTO listeners (name, role, host, pid, address, seen_at) "
            "VALUES ('a', 'receiver', 'here', 11, 'addr', now()), "
            "('b', 'receiver', 'gone', 12, 'addr', now() - interval '1 hour')"
        )
        door.rows("INSERT INTO workers (name, host, pid, handlers, keys) VALUES ('w', 'there', 13, '{}', '{x}')")
        problem = run.fails("keys", "activate", new, "--wait", "0")
        assert "receiver 11 on here" in problem
        assert "worker 13 on there" in problem
        assert "gone" not in problem
        door.rows(f"UPDATE listeners SET keys = ARRAY['{new}']")
        door.rows(f"UPDATE workers SET keys = ARRAY['{new}']")
        run("keys", "activate", new)

    def test_twice_and_unknown(self, run: Commands) -> None:
        """An active key cannot be activated again, nor one that this host lacks."""
        new = run.json("keys", "new", "payload")["id"]
        run("keys", "activate", new)
        assert "active already" in run.fails("keys", "activate", new)
        assert "keys list" in run.fails("keys", "activate", "payload-00000000", "--wait", "0")

    def test_a_host_may_lack_a_pending_key(self, run: Commands, keyring_path: Path) -> None:
        """Until it is activated, a host without it works; from then on it refuses, naming the key."""
        before = keyring_path.read_bytes()
        new = run.json("keys", "new", "mac")["id"]
        whole = keyring_path.read_bytes()
        keyring_path.write_bytes(before)
        run("destination", "list")
        keyring_path.write_bytes(whole)
        run("keys", "activate", new)
        keyring_path.write_bytes(before)
        assert f"lacks key {new}" in run.fails("destination", "list")

    def test_a_file_that_was_copied_before(self, run: Commands, keyring_path: Path, door: Door) -> None:
        """The database says which keys are active, also to a host whose file still calls the key pending."""
        new = run.json("keys", "new", "mac")["id"]
        copied = keyring_path.read_bytes()
        run("keys", "activate", new)
        keyring_path.write_bytes(copied)
        run("source", "add", "clinic", "11111111-1111-4111-8111-111111111111")
        assert new in {row.mac_key for row in door.rows("SELECT mac_key FROM sources")}


class TestRetire:
    def test_nothing_that_is_needed(self, run: Commands, door: Door) -> None:
        """Not the current key, and not one under which a row stands: both are said."""
        old = next(each["id"] for each in run.json("keys", "list") if each["purpose"] == "mac")
        assert "activate a newer key first" in run.fails("keys", "retire", old)
        new = run.json("keys", "new", "mac")["id"]
        run("keys", "activate", new)
        assert "audit_events.mac_key" in run.fails("keys", "retire", old)
        counted = {(each["id"], each["column"]): each["rows"] for each in run.json("keys", "count")}
        assert counted[(old, "destinations.mac_key")] == door.value("SELECT count(*) FROM destinations")

    def test_a_process_that_may_still_write_with_it(self, run: Commands, door: Door) -> None:
        """One that started before the newer key was activated must be restarted first."""
        old = next(each["id"] for each in run.json("keys", "list") if each["purpose"] == "session")
        new = run.json("keys", "new", "session")["id"]
        door.rows(f"INSERT INTO workers (name, host, pid, handlers, keys) VALUES ('w', 'h', 13, '{{}}', '{{{new}}}')")
        run("keys", "activate", new)
        assert "worker 13 on h" in run.fails("keys", "retire", old)
        door.rows("UPDATE workers SET started_at = now()")
        run("keys", "retire", old)

    def test_it_is_gone_from_the_file(self, run: Commands, keyring_path: Path) -> None:
        """A retired key is no longer held nor needed; the audit names who retired it."""
        old = next(each["id"] for each in run.json("keys", "list") if each["purpose"] == "session")
        new = run.json("keys", "new", "session")["id"]
        run("keys", "activate", new)
        done = run("keys", "retire", old, "--json")
        assert json.loads(done.stdout) == {"id": old, "stage": "retired"}
        assert "Backups" in done.stderr
        assert old not in keyrings.load_keyring(keyring_path)
        listed = {each["id"]: each for each in run.json("keys", "list")}
        assert (listed[old]["stage"], listed[old]["held"]) == ("retired", False)
        row, *_ = run.json("audit", "list", "--action", "key.retire")
        assert (row["actor"], row["subject"]) == (ACTOR, f"keys:{old}")
        assert "retired already" in run.fails("keys", "retire", old)


class TestList:
    def test_keys_are_never_shown(self, run: Commands, keyring_path: Path) -> None:
        """Keys are shown by id and fingerprint. No secret is printed."""
        printed = run("keys", "list").stdout + run("keys", "list", "--json").stdout
        for key in keyrings.load_keyring(keyring_path).keys:
            assert key.id in printed
            assert key.secret.hex() not in printed
        for line in keyring_path.read_text().splitlines():
            if '"key"' in line:
                assert line.partition(":")[2].strip(' ",') not in printed

    def test_what_this_host_lacks(self, run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list works with another keyring too, and shows where each key is."""
        keyrings.create(datetime.now(UTC)).save(tmp_path / "other.json")
        monkeypatch.setenv("RECEIVER_KEYRING", str(tmp_path / "other.json"))
        found = run.json("keys", "list")
        assert sorted((each["held"], each["recorded"]) for each in found) == (
            [(False, True)] * len(PURPOSES) + [(True, False)] * len(PURPOSES)
        )
