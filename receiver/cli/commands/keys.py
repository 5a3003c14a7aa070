"""The command group `keys`: the keyring of this host, and the fingerprints of its keys in the database.

Must not show a key, only its id and fingerprint.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from sqlalchemy import Connection, Engine, text

from receiver import keyring as keyrings
from receiver import settings
from receiver.cli import output, session
from receiver.cli.options import example, json_option
from receiver.errors import Conflict, NotFound
from receiver.keyring import PURPOSES, Key, Keyring
from receiver.storage.evidence import proofs
from receiver.storage.evidence.audit_log import AuditEvent, write_once
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations import queries
from receiver.storage.registry import key_records
from receiver.storage.registry.key_records import check_keys, record_keys

COLUMNS: Final = ("id", "purpose", "created", "fingerprint", "current", "held", "recorded", "stage")
# Seconds between two looks at which processes hold a key.
_POLL_INTERVAL: Final = 0.5


@click.group()
def keys() -> None:
    """Manage the keyring: its keys encrypt payloads and secrets, sign rows, and index patients.

    Stored data cannot be read without it: keep a copy, separate from the backups of the database. Every host needs the
    same keyring.
    """


@keys.command(epilog=example("keys init"))
@json_option
def init(*, as_json: bool) -> None:
    """Create the keyring of this database, with one key for each purpose. Fails if one exists."""
    given = settings.load_settings()
    path = given.keyring_path
    if path.exists():
        raise Conflict(f"a keyring already exists at {path}: see `redox-receiver keys list`")
    made = keyrings.create(datetime.now(UTC))
    with session.database(given, make=True) as engine:
        session.check_schema(engine)
        with _exclusive(engine) as connection:
            if queries.keys(connection):
                raise Conflict(
                    f"this database was written with a keyring that is not at {path}: restore that keyring, "
                    "or set RECEIVER_KEYRING to its path"
                )
            _record(connection, made, made, path, None)
        with engine.connect() as connection:
            listed = _listed(connection, made, made)
    output.rows(listed, ("id", "purpose", "fingerprint"), as_json=as_json, nothing="")
    output.say(f"created {path}: keep a copy, separate from the backups of the database")


@keys.command("list", epilog=example("keys list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the keys of this host, and the keys that are recorded in the database."""
    given = settings.load_settings()
    session.check_made(given)
    held = keyrings.load_keyring(given.keyring_path)
    with session.database(given) as engine:
        session.check_schema(engine)
        with engine.connect() as connection:
            found = _listed(connection, held, held)
            recorded = queries.keys(connection)
    found += [
        {
            "id": each["id"],
            "purpose": each["purpose"],
            "created": each["created_at"],
            "fingerprint": each["fingerprint"],
            "current": False,
            "held": False,
            "recorded": True,
            "stage": stage(each),
        }
        for each in recorded
        if each["id"] not in held
    ]
    output.rows(found, COLUMNS, as_json=as_json, nothing="no key")


@keys.command(epilog=example("keys public > seal.pub"))
@json_option
def public(*, as_json: bool) -> None:
    """Show the public keys that check the audit log's checkpoints, one in each line (c2sp.org/signed-note).

    The newest is last. Publish them, or give them to those who check proofs: they are not secret.
    """
    with session.opened() as work:
        AuditSealer(work.engine, work.keyring).seal(wait=True)
        with work.engine.connect() as connection:
            found = proofs.public_keys(connection, work.keyring)
    if as_json:
        output.document([{"id": name, "public_key": str(key)} for name, key in found.items()])
    else:
        for key in found.values():
            click.echo(str(key))


@keys.command(epilog=example("keys new payload"))
@click.argument("purpose", type=click.Choice(PURPOSES))
@json_option
def new(purpose: str, *, as_json: bool) -> None:
    """Create a pending key for PURPOSE. Nothing is written with it before `keys activate`."""
    with session.opened() as work:
        path = work.settings.keyring_path
        with _exclusive(work.engine) as connection:
            # Read again under the lock: another `keys new` may have changed the file.
            old = keyrings.load_keyring(path)
            check_keys(connection, old)
            ring = old.with_new(purpose, datetime.now(UTC), pending=True)
            added = Keyring([ring.keys[-1]])
            _record(connection, ring, added, path, old)
        with work.engine.connect() as connection:
            listed = _listed(connection, added, ring)
    output.row(listed[0], as_json=as_json)
    output.say(
        f"now copy {path} to every other host; running processes read it within five seconds. "
        f"Then run `redox-receiver keys activate {added.keys[0].id}`"
    )


@keys.command(epilog=example("keys activate payload-1a2b3c4d"))
@click.argument("key_id", metavar="ID")
@click.option(
    "--wait",
    type=click.IntRange(0, 3600),
    default=15,
    show_default=True,
    metavar="SECONDS",
    help="Wait this long for running processes to read the key.",
)
@json_option
def activate(key_id: str, *, wait: int, as_json: bool) -> None:
    """Write with the pending key ID from now on, on every host.

    Fails while a running process does not hold the key: copy the keyring file to its host first. Running processes
    follow within a second; none needs a restart.
    """
    with session.opened() as work:
        path = work.settings.keyring_path
        _wait_until_held(work.engine, key_id, wait)
        with _exclusive(work.engine) as connection:
            old = keyrings.load_keyring(path)
            if key_id not in old:
                raise NotFound(f"this host does not hold key {key_id}: see `redox-receiver keys list`")
            key_records.activate(connection, key_id)
            ring = old.with_active(key_id)
            _audit(connection, work.keyring, "key.activate", [ring[key_id]])
            check_keys(connection, ring)
            listed = _listed(connection, Keyring([ring[key_id]]), ring)
            # The file may stay behind: the database says which keys are active.
            ring.save(path)
    output.row(listed[0], as_json=as_json)


@keys.command(epilog=example("keys retire payload-1a2b3c4d"))
@click.argument("key_id", metavar="ID")
@json_option
def retire(key_id: str, *, as_json: bool) -> None:
    """Remove the key ID, which nothing stored needs any longer, from the keyring of this host.

    Fails if rows were written with the key, or if a process started before a newer key was activated. This reads whole
    tables. Remove the key from the other hosts by copying the keyring file.
    """
    with session.opened() as work:
        path = work.settings.keyring_path
        with _exclusive(work.engine) as connection:
            old = keyrings.load_keyring(path)
            key_records.retire(connection, key_id)
            check_keys(connection, old)
            ring, gone = old.without(key_id), Keyring(key for key in old.keys if key.id == key_id)
            _audit(connection, work.keyring, "key.retire", gone.keys)
        # After the commit: a key that is missing too early could not be restored.
        ring.save(path)
    output.row({"id": key_id, "stage": "retired"}, as_json=as_json)
    output.say(
        f"now copy {path} to every other host. Backups made before still need the key: keep the old file with them"
    )


@keys.command("count", epilog=example("keys count"))
@json_option
def count_(*, as_json: bool) -> None:
    """Count the rows that were written with each key, by table. Reads whole tables."""
    with session.opened() as work, work.engine.connect() as connection:
        found = [
            {"id": each["id"], "column": column, "rows": number}
            for each in queries.keys(connection)
            for column, number in key_records.counts(connection, each["id"])
            if number
        ]
    output.rows(found, ("id", "column", "rows"), as_json=as_json, nothing="no row was written with a key yet")


def _wait_until_held(engine: Engine, key_id: str, seconds: int) -> None:
    """Return when every running process holds the key, or after that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with engine.connect() as connection:
            if not key_records.lacking(connection, key_id):
                return
        time.sleep(_POLL_INTERVAL)


@contextmanager
def _exclusive(engine: Engine) -> Iterator[Connection]:
    """A transaction that locks the table `keys` against other writers."""
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE keys IN EXCLUSIVE MODE"))
        yield connection


def _record(connection: Connection, ring: Keyring, added: Keyring, path: Path, old: Keyring | None) -> None:
    """Write the fingerprints of the added keys, the audit rows, and last the file."""
    record_keys(connection, ring)
    _audit(connection, ring, "key.new", added.keys)
    ring.save(path)
    try:
        connection.commit()
    except BaseException:
        # A key that is not recorded in the database must not be used.
        if old is None:
            path.unlink()
        else:
            old.save(path)
        raise


def _audit(connection: Connection, ring: Keyring, action: str, some: Iterable[Key]) -> None:
    now, actor = datetime.now(UTC), session.actor()
    write_once(
        connection,
        ring,
        [
            AuditEvent(
                action=action,
                outcome="done",
                at=now,
                actor=actor,
                subject=f"keys:{key.id}",
                detail={"purpose": key.purpose, "fingerprint": key.fingerprint},
            )
            for key in some
        ],
    )


def _listed(connection: Connection, some: Keyring, ring: Keyring) -> list[dict[str, object]]:
    recorded = {each["id"]: each for each in queries.keys(connection)}
    active = [each for each in recorded.values() if stage(each) == "active"]
    ring.activate({each["id"] for each in active})
    current = {ring.current(each["purpose"]).id for each in active if each["id"] in ring}
    return [
        {
            "id": key.id,
            "purpose": key.purpose,
            "created": key.created,
            "fingerprint": key.fingerprint,
            "current": key.id in current,
            "held": True,
            "recorded": recorded.get(key.id, {}).get("fingerprint") == key.fingerprint,
            "stage": stage(recorded[key.id]) if key.id in recorded else None,
        }
        for key in some.keys
    ]


def stage(row: Mapping[str, Any]) -> str:
    """Return the stage of a recorded key: pending, active or retired."""
    if row["retired_at"] is not None:
        return "retired"
    return "pending" if row["activated_at"] is None else "active"
