"""The command group `keys`: the keyring of this host, and the fingerprints of its keys in the database.

Must not show a key, only its id and fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from sqlalchemy import Connection, Engine, text

from receiver import keyring as keyrings
from receiver import settings
from receiver.cli import output, session
from receiver.cli.options import example, json_option
from receiver.errors import Conflict
from receiver.keyring import PURPOSES, Keyring
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations import queries
from receiver.storage.registry.changes import check_keys, record_keys

COLUMNS: Final = ("id", "purpose", "created", "fingerprint", "current", "held", "recorded")


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
    output.rows(_listed(made, made), ("id", "purpose", "fingerprint"), as_json=as_json, nothing="")
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
            recorded = {each["id"]: each for each in queries.keys(connection)}
    found = [
        each | {"held": True, "recorded": recorded.get(each["id"], {}).get("fingerprint") == each["fingerprint"]}
        for each in _listed(held, held)
    ]
    mine = {key.id for key in held.keys}
    found += [
        {
            "id": name,
            "purpose": each["purpose"],
            "created": each["created_at"],
            "fingerprint": each["fingerprint"],
            "current": False,
            "held": False,
            "recorded": True,
        }
        for name, each in recorded.items()
        if name not in mine
    ]
    output.rows(found, COLUMNS, as_json=as_json, nothing="no key")


@keys.command(epilog=example("keys new payload"))
@click.argument("purpose", type=click.Choice(PURPOSES))
@json_option
def new(purpose: str, *, as_json: bool) -> None:
    """Create a new current key for PURPOSE. Older keys are kept to read existing data."""
    with session.opened() as work:
        path = work.settings.keyring_path
        with _exclusive(work.engine) as connection:
            # Read again under the lock: another `keys new` may have changed the file.
            old = keyrings.load_keyring(path)
            check_keys(connection, old)
            ring = old.with_new(purpose, datetime.now(UTC))
            added = Keyring([ring.current(purpose)])
            _record(connection, ring, added, path, old)
    output.row(_listed(added, ring)[0], as_json=as_json)
    output.say(
        f"now copy {path} to every other host before you change anything else: a host without the new key "
        "answers 503. Running processes reload the keyring to read data; restart them to write with the new key"
    )


@contextmanager
def _exclusive(engine: Engine) -> Iterator[Connection]:
    """A transaction that locks the table `keys` against other writers."""
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE keys IN EXCLUSIVE MODE"))
        yield connection


def _record(connection: Connection, ring: Keyring, added: Keyring, path: Path, old: Keyring | None) -> None:
    """Write the fingerprints of the added keys, the audit rows, and last the file."""
    now, actor = datetime.now(UTC), session.actor()
    record_keys(connection, ring)
    write(
        connection,
        AuditChain(ring, Sealer(ring)),
        [
            AuditEvent(
                action="key.new",
                outcome="done",
                at=now,
                actor=actor,
                subject=f"keys:{key.id}",
                detail={"purpose": key.purpose, "fingerprint": key.fingerprint},
            )
            for key in added.keys
        ],
    )
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


def _listed(some: Keyring, ring: Keyring) -> list[dict[str, object]]:
    return [
        {
            "id": key.id,
            "purpose": key.purpose,
            "created": key.created,
            "fingerprint": key.fingerprint,
            "current": ring.current(key.purpose).id == key.id,
        }
        for key in some.keys
    ]
