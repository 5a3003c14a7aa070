from __future__ import annotations

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
    """Where the keyring of a database that has none is to be."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data" / "keyring.json"


class TestInit:
    def test_a_key_of_each_purpose(self, place: Path) -> None:
        """The file is for its owner alone, its fingerprints are on record, and the audit says who made it."""
        run = Commands()
        made = run.json("keys", "init")
        assert [each["purpose"] for each in made] == list(PURPOSES)
        assert place.stat().st_mode & 0o777 == 0o600
        assert all(each["recorded"] and each["held"] and each["current"] for each in run.json("keys", "list"))
        assert {each["actor"] for each in run.json("audit", "list", "--action", "key.new")} == {ACTOR}
        assert run.json("audit", "verify")["first_bad"] is None

    def test_never_a_second_one(self, place: Path) -> None:
        """Where there is a keyring, it stays as it is."""
        run = Commands()
        run("keys", "init")
        before = place.read_bytes()
        assert "keys list" in run.fails("keys", "init")
        assert place.read_bytes() == before

    def test_not_for_a_database_that_has_one(self, place: Path) -> None:
        """A database that was written with other keys wants those back, not new ones."""
        run = Commands()
        run("keys", "init")
        place.unlink()
        assert "restore" in run.fails("keys", "init")
        assert not place.exists()

    def test_one_of_two_at_once(self, place: Path) -> None:
        """Of two that make a keyring at the same moment, on two hosts, one does, and the other is told."""
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
    def test_it_is_used_from_now_on(self, run: Commands, keyring_path: Path, door: Door) -> None:
        """The newest of its purpose is the current one; the older one stays; what to do next is said."""
        old = keyrings.load_keyring(keyring_path).current("payload")
        done = run("keys", "new", "payload", "--json")
        ring = keyrings.load_keyring(keyring_path)
        assert ring.current("payload").id != old.id
        assert ring[old.id].secret == old.secret
        assert "every other host" in done.stderr
        assert [each["current"] for each in run.json("keys", "list") if each["purpose"] == "payload"] == [False, True]
        told, *_ = run.json("audit", "list", "--action", "key.new")
        assert (told["actor"], told["subject"]) == (ACTOR, f"keys:{ring.current('payload').id}")
        assert run.json("audit", "verify")["first_bad"] is None

    def test_there_is_one_index_key_for_good(self, run: Commands, keyring_path: Path) -> None:
        """Digests that are looked up could not be made again with another key."""
        before = keyring_path.read_bytes()
        assert "index" in run.fails("keys", "new", "index")
        run.fails("keys", "new", "magic", status=2)
        assert keyring_path.read_bytes() == before

    def test_nothing_is_kept_that_is_not_on_record(self, run: Commands, keyring_path: Path, door: Door) -> None:
        """Where the database does not take the fingerprint, the file is as it was."""
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


class TestList:
    def test_keys_are_never_shown(self, run: Commands, keyring_path: Path) -> None:
        """Ids and fingerprints name them; nothing of the file's secrets is printed."""
        said = run("keys", "list").stdout + run("keys", "list", "--json").stdout
        for key in keyrings.load_keyring(keyring_path).keys:
            assert key.id in said
            assert key.secret.hex() not in said
        for line in keyring_path.read_text().splitlines():
            if '"key"' in line:
                assert line.partition(":")[2].strip(' ",') not in said

    def test_what_this_host_lacks(self, run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With another keyring the list works all the same, and shows which keys are whose."""
        keyrings.create(datetime.now(UTC)).save(tmp_path / "other.json")
        monkeypatch.setenv("RECEIVER_KEYRING", str(tmp_path / "other.json"))
        found = run.json("keys", "list")
        assert sorted((each["held"], each["recorded"]) for each in found) == (
            [(False, True)] * len(PURPOSES) + [(True, False)] * len(PURPOSES)
        )
