"""`db` migrates, checks, backs up and restores the database."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, make_url, text

from receiver import keyring as keyrings
from receiver.cli import main
from receiver.database import migrations
from receiver.database.compatibility import schema_compatibility
from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.outbound.outbox import Caller, Outbox
from receiver.protocol.api_keys import LegacyKey
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations import backups, postgres_programs, restore
from receiver.storage.queue import leases, outbox
from receiver.storage.queue.leases import Lease
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys
from receiver.storage.registry.changes import RegistryChanges
from tests.storage.door import Door, body
from tests.storage.hand import LANE, arrive
from tests.support.postgres import drop_database, new_database

Run = Callable[..., Any]


@pytest.fixture
def run(database_url: str, keyring_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the fresh database. Returns its JSON, or with `fails` its error line."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))

    def command(*arguments: str, fails: bool = False, as_json: bool = True) -> Any:
        done = CliRunner().invoke(main, [*arguments, *(["--json"] if as_json and not fails else [])])
        assert done.exit_code == (1 if fails else 0), done.output
        return done.stderr if fails else json.loads(done.stdout) if as_json else done.stdout

    return command


@pytest.fixture
def empty() -> Iterator[str]:
    """The URL of an empty database."""
    url = new_database()
    yield url
    drop_database(url)


def test_upgrade_makes_the_tables(run: Run, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`db upgrade` migrates an empty database to the needed revision. A second one changes nothing."""
    monkeypatch.setenv("DATABASE_URL", empty)
    head = migrations.head()
    assert run("db", "current") == {"revision": None, "wanted": head}
    assert run("db", "upgrade") == {"before": None, "revision": head}
    assert run("db", "current") == {"revision": head, "wanted": head}
    assert run("db", "upgrade", as_json=False) == f"the schema is already at {head}\n"


def test_check(run: Run) -> None:
    """`db check` fails if one check is bad: the tests' database is not durable."""
    done = CliRunner().invoke(main, ["db", "check", "--json"])
    assert done.exit_code == 1
    assert {each["name"]: each["state"] for each in json.loads(done.stdout)} == {
        "database": "ok",
        "writable": "ok",
        "durability": "bad",
        "clock": "ok",
        "migrations": "ok",
        "keys": "ok",
    }
    done = CliRunner().invoke(main, ["db", "check"])
    assert "OK    database    PostgreSQL 18" in done.stdout
    assert "BAD   durability  fsync, full_page_writes, synchronous_commit off" in done.stdout
    assert len(done.stdout.splitlines()) == 6


@pytest.fixture
def backup(run: Run, registration: RegistryChanges, tmp_path: Path) -> Path:
    """A backup of a database with a destination."""
    registration.add_destination(
        "lab",
        datetime.now(UTC),
        environment="development",
        require=["token"],
        sources_policy="registered",
        on_unknown_source="reject",
        test_messages="accept",
        reply_with=None,
        token="a-token-of-thirty-two-characters",
    )
    run("db", "backup", str(tmp_path / "backup"))
    return tmp_path / "backup"


def test_there_and_back(run: Run, backup: Path, empty: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup is restored into an empty database. The audit records both."""
    assert [each["action"] for each in run("audit", "list", "--limit", "1")] == ["database.backup"]
    monkeypatch.setenv("DATABASE_URL", empty)
    message = run("db", "restore", str(backup))
    assert message["pending"] == 0
    assert [each["name"] for each in run("destination", "list")] == ["lab"]
    restored, *_ = run("audit", "list")
    assert (restored["action"], restored["outcome"]) == ("database.restore", "done")
    assert restored["detail"]["sha256"] == message["sha256"]


def test_what_waits_for_redox_is_held(
    run: Run, empty: str, engine: Engine, keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in a restored database wait for an operator, because they may have been sent since. No worker claims
    them."""
    ApiKeys(engine, keyring, actor="tester@test").add_api_key(
        "lab",
        ApiEndpoint(environment="development", base_url="http://127.0.0.1:9", source_id=None),
        LegacyKey(api_key="k", secret="s"),
        datetime.now(UTC),
    )
    Outbox(engine, keyring, caller=Caller(name="tester@test")).send(
        {"Meta": {"DataModel": "Notes", "EventType": "New", "Destinations": [{"ID": "d"}]}}
    )
    run("db", "backup", str(tmp_path / "backup"))
    monkeypatch.setenv("DATABASE_URL", empty)
    assert run("db", "restore", str(tmp_path / "backup"))["held"] == 1
    restored = open_engine(empty)
    with restored.connect() as connection:
        assert outbox.due(connection) == []
    [held] = run("outbox", "list", "--state", "held")
    found = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["findings"]
    assert "outbox_held" in {each["code"] for each in found}
    run("outbox", "retry", "--state", "held", "--reason", "not sent before, says the other side")
    assert run("outbox", "show", str(held["id"]))["state"] == "pending"
    with restored.connect() as connection:
        assert outbox.due(connection) == ["@outbox/lab/d"]
    restored.dispose()


def test_deliveries_that_may_have_run_are_on_hold(
    run: Run, door: Door, ledger: MessageLedger, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker runs deliveries that were pending in the backup, or later ones, until an operator resumes them."""
    door.enable()
    arrive(door, ledger, body())
    run("db", "backup", str(tmp_path / "backup"))
    monkeypatch.setenv("DATABASE_URL", empty)
    printed = run("db", "restore", str(tmp_path / "backup"), as_json=False)
    assert "1 delivery on hold" in printed
    assert "deliveries resume" in printed
    restored = open_engine(empty)

    def claimed() -> bool:
        with restored.begin() as connection:
            return isinstance(leases.claim(connection, LANE, "worker-1", 30), Lease)

    assert not claimed()
    found = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["findings"]
    (fix,) = (each["fix"] for each in found if each["code"] == "deliveries_held")
    assert fix == "redox-receiver deliveries resume --handler register --destination clinic --reason …"
    why = ("--reason", "those that had run are skipped")
    assert run("deliveries", "resume", "--handler", "other", *why) == []
    assert run("deliveries", "resume", *why) == [{"destination": "clinic", "handler": "register", "pending": 1}]
    assert claimed()
    assert run("deliveries", "resume", *why) == []
    message, *_ = run("audit", "list", "--action", "handler.resume", "--notes", "--reason", "a review")
    assert message["note"] == why[1]
    restored.dispose()


def test_no_worker_starts_before_the_hold(
    run: Run, door: Door, ledger: MessageLedger, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that waits for the database finds no compatible schema before the pending deliveries are on hold, and
    cannot claim them afterwards, even before the schema is upgraded.
    """
    door.enable()
    arrive(door, ledger, body())
    run("db", "backup", str(tmp_path / "backup"))
    monkeypatch.setenv("DATABASE_URL", empty)
    restored = open_engine(empty)
    hold, upgrade = restore._hold, migrations.upgrade
    seen: list[object] = []

    def before_the_hold(engine: Engine, revision: str) -> restore.RestoredWork:
        with restored.connect() as connection:
            seen.append(connection.scalar(text("SELECT count(*) FROM deliveries WHERE state = 'pending'")))
            seen.append(schema_compatibility(connection).compatible)
        return hold(engine, revision)

    def after_the_hold(engine: Engine) -> None:
        with restored.begin() as connection:
            seen.append(schema_compatibility(connection).compatible)
            seen.append(leases.claim(connection, LANE, "worker-1", 30))
        upgrade(engine)

    monkeypatch.setattr(restore, "_hold", before_the_hold)
    monkeypatch.setattr(migrations, "upgrade", after_the_hold)
    run("db", "restore", str(tmp_path / "backup"))
    assert seen == [1, False, True, None]
    restored.dispose()


def test_what_was_paused_by_hand_is_not_resumed_with_it(
    run: Run, door: Door, ledger: MessageLedger, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming after a restore leaves handlers paused that an operator had paused. An idle handler is not paused."""
    door.enable()
    run("db", "backup", str(tmp_path / "idle"))
    run("handlers", "pause", "register")
    arrive(door, ledger, body())
    run("db", "backup", str(tmp_path / "paused"))
    monkeypatch.setenv("DATABASE_URL", empty)
    run("db", "restore", str(tmp_path / "paused"))
    assert run("deliveries", "resume", "--reason", "x") == []
    assert run("handlers", "list")[0]["pause_reason"] == "operator"
    other = new_database()
    try:
        monkeypatch.setenv("DATABASE_URL", other)
        run("db", "restore", str(tmp_path / "idle"))
        assert run("handlers", "list")[0]["paused_at"] is None
    finally:
        drop_database(other)


def test_a_backup_is_for_its_owner_alone(backup: Path) -> None:
    """Only the owner can read the directory and its two files, dump and manifest."""
    assert backup.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in backup.iterdir()} == {
        backups.DUMP: 0o600,
        backups.MANIFEST: 0o600,
    }


def test_the_keyring_is_not_in_a_backup(backup: Path, keyring: Keyring) -> None:
    """A backup names the keys that it needs, and contains none."""
    manifest = json.loads((backup / backups.MANIFEST).read_text())
    assert {each["id"]: each["fingerprint"] for each in manifest["keys"]} == {
        key.id: key.fingerprint for key in keyring.keys
    }
    everything = b"".join(path.read_bytes() for path in backup.iterdir())
    assert not any(key.secret in everything or key.secret.hex().encode() in everything for key in keyring.keys)


def test_a_directory_in_use(run: Run, tmp_path: Path) -> None:
    """A backup is never written into a directory that is not empty."""
    (tmp_path / "letter.txt").write_text("mine")
    assert "is not empty: name a new directory" in run("db", "backup", str(tmp_path), fails=True)


def test_only_into_an_empty_database(run: Run, backup: Path) -> None:
    """A restore into a database that is not empty is refused, and changes nothing."""
    message = run("db", "restore", str(backup), fails=True)
    assert "the database is not empty (it holds " in message
    assert [each["name"] for each in run("destination", "list")] == ["lab"]


def test_without_its_keyring(
    run: Run, backup: Path, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its keys a backup is not restored. The error names the keys, and nothing is changed."""
    monkeypatch.setenv("DATABASE_URL", empty)
    monkeypatch.setenv("RECEIVER_KEYRING", str(tmp_path / "nowhere.json"))
    assert "install the keyring of this backup at" in run("db", "restore", str(backup), fails=True)
    other = tmp_path / "other.json"
    keyrings.create(datetime.now(UTC)).save(other)
    monkeypatch.setenv("RECEIVER_KEYRING", str(other))
    assert "does not match keys of this backup (" in run("db", "restore", str(backup), fails=True)
    assert run("db", "current")["revision"] is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / backups.DUMP).write_bytes(b"PGDMP"), "is not what was backed up"),
        (lambda at: (at / backups.DUMP).unlink(), "holds no readable backup"),
        (lambda at: (at / backups.MANIFEST).write_text("{}"), "is damaged: take another backup"),
        (
            lambda at: (at / backups.MANIFEST).write_text(
                (at / backups.MANIFEST).read_text().replace(migrations.head(), "9999")
            ),
            "MAC does not hold",
        ),
    ],
)
def test_a_damaged_backup(
    run: Run, backup: Path, empty: str, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], message: str
) -> None:
    """An incomplete backup, or one of an unknown version, is refused before anything is changed."""
    monkeypatch.setenv("DATABASE_URL", empty)
    damage(backup)
    assert message in run("db", "restore", str(backup), fails=True)
    assert run("db", "current")["revision"] is None


def test_a_backup_that_the_keyring_did_not_sign(
    run: Run, backup: Path, empty: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump with a forged manifest is refused before the dump is opened. A signed one of a later release is
    accepted."""
    monkeypatch.setenv("DATABASE_URL", empty)
    monkeypatch.setattr(restore, "find_program", lambda *_: pytest.fail("a dump is opened"))
    (backup / backups.DUMP).write_bytes(b"another")
    made = backups.read_manifest(backup)
    for changes, message in (
        ({"sha256": sha256(b"another").hexdigest(), "size": 7}, "MAC does not hold"),
        ({"mac": ""}, "MAC does not hold"),
        ({"mac_key": "mac-0"}, "MAC does not hold"),
    ):
        _write(backup, replace(made, **changes))
        assert message in run("db", "restore", str(backup), fails=True)
    later = replace(made, revision="9999", sha256=sha256(b"another").hexdigest())
    _write(backup, replace(later, mac=later.signed(keyring)))
    assert "which redox-receiver" in run("db", "restore", str(backup), fails=True)


def _write(backup: Path, manifest: backups.Backup) -> None:
    (backup / backups.MANIFEST).write_text(json.dumps(backups._fields(manifest)))


def test_restored_as_no_superuser(
    run: Run, backup: Path, empty: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role that restores cannot run a program on the server. Afterwards it is dropped, and its objects are ours."""
    monkeypatch.setenv("DATABASE_URL", empty)
    ran = postgres_programs.run_program
    seen: list[bool] = []

    def look(*arguments: Any, role: tuple[str, str]) -> None:
        engine = open_engine(empty)
        with engine.connect() as connection:
            seen.append(
                connection.execute(
                    text("SELECT rolsuper FROM pg_roles WHERE rolname = :name"), {"name": role[0]}
                ).scalar_one()
            )
        engine.dispose()
        ran(*arguments, role=role)

    monkeypatch.setattr(restore, "run_program", look)
    run("db", "restore", str(backup))
    assert seen == [False]
    restored = open_engine(empty)
    with restored.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM pg_roles WHERE rolname ~ '^redox_restore'")).scalar() == 0
        assert connection.execute(
            text("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname IN ('public', 'procrastinate')")
        ).scalars().all() == [restored.url.username]
    restored.dispose()


def test_a_dump_that_would_run_a_program(
    run: Run, backup: Path, empty: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump with a function that runs a program on the server is not restored: the role lacks the right."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION evil(integer) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN "
                "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'; RETURN 1; END $$"
            )
        )
        connection.execute(text("CREATE MATERIALIZED VIEW trap AS SELECT public.evil(1)"))
    second = tmp_path / "second"
    run("db", "backup", str(second))
    monkeypatch.setenv("DATABASE_URL", empty)
    assert "pg_restore failed" in run("db", "restore", str(second), fails=True)
    assert "permission denied" in (second / "pg_restore.log").read_text()
    assert run("db", "current")["revision"] is None


def test_revocations_that_are_taken_back_are_listed(
    run: Run, backup: Path, empty: str, registration: RegistryChanges, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the replaced database, the report lists the credentials that were revoked since the backup."""
    [token] = run("credential", "list")
    registration.add_credential("lab", datetime.now(UTC), "token", {}, b"another-token-of-some-length")
    run("credential", "revoke", str(token["id"]))
    replaced = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", empty)
    message = run("db", "restore", str(backup), "--replaces", replaced)
    assert message["live_again"] == [{"id": token["id"], "destination": "lab", "kind": "token", "label": None}]
    assert message["first_bad"] is None


def test_without_the_database_that_is_replaced(
    run: Run, backup: Path, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the replaced database the report lists every live credential, and says why."""
    monkeypatch.setenv("DATABASE_URL", empty)
    message = run("db", "restore", str(backup), as_json=False)
    assert "including any that were revoked after the backup" in message
    assert "lab" in message
    assert "audit verify: " in message


def test_a_restored_database_that_does_not_hold(
    run: Run, backup: Path, empty: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that fails verification is restored. The report names the first bad row, and the exit status is 1."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE destinations SET require = '{}'"))
    run("db", "backup", str(tmp_path / "second"))
    monkeypatch.setenv("DATABASE_URL", empty)
    done = CliRunner().invoke(main, ["db", "restore", str(tmp_path / "second"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["first_bad"].startswith("destinations id 1: ")
    assert "use another backup" in done.stderr


def test_a_failed_restore_changes_nothing(run: Run, backup: Path, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore that fails leaves the database empty. The output of pg_restore is only in a file."""
    monkeypatch.setenv("DATABASE_URL", empty)
    address = make_url(empty)
    with psycopg.connect(host=str(address.query["host"]), user=address.username, dbname=address.database) as connection:
        # Not a table, so the database counts as empty, but it has a name that the backup needs.
        connection.execute("CREATE TYPE destinations AS ENUM ('in the way')")
    message = run("db", "restore", str(backup), fails=True)
    assert f"pg_restore failed (exit status 1): see {backup / 'pg_restore.log'}" in message
    assert "in the way" not in message
    assert (backup / "pg_restore.log").stat().st_mode & 0o777 == 0o600
    assert run("db", "current")["revision"] is None


def test_a_password_stays_out_of_the_process_list(engine: Engine, tmp_path: Path) -> None:
    """pg_dump gets the password in its environment, and not in its arguments, which every user can read."""
    spy = tmp_path / "spy"
    spy.write_text('#!/bin/sh\necho "$@" > "$0.args"\necho "$PGPASSWORD" > "$0.password"\n')
    spy.chmod(0o700)
    with_password = Engine(engine.pool, engine.dialect, engine.url.set(password="canary-password"))
    postgres_programs.run_program([spy], with_password, tmp_path / "log")
    assert "canary-password" not in (tmp_path / "spy.args").read_text()
    assert (tmp_path / "spy.password").read_text() == "canary-password\n"
