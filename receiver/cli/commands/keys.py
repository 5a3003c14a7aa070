"""`keys`: the keyring of this host, and the fingerprints of its keys in the database.

May not show a key: ids and fingerprints name them.
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
    """The keyring: what seals payloads and secrets, signs rows, and finds patients.

    Without it nothing that is stored can be read: keep a copy of it, apart from the database's backups. Every host
    needs the same one.
    """


@keys.command(epilog=example("keys init"))
@json_option
def init(*, as_json: bool) -> None:
    """Make the keyring of this database, with one key of each purpose. Refuses when there is one."""
    given = settings.load_settings()
    place = given.keyring_path
    if place.exists():
        raise Conflict(f"there is a keyring at {place} already: see `redox-receiver keys list`")
    made = keyrings.create(datetime.now(UTC))
    with session.database(given, make=True) as engine:
        session.check_schema(engine)
        with _alone(engine) as connection:
            if queries.keys(connection):
                raise Conflict(
                    f"this database was written with a keyring that is not at {place}: restore that one "
                    "(RECEIVER_KEYRING names another place)"
                )
            _record(connection, made, made, place, None)
    output.rows(_listed(made, made), ("id", "purpose", "fingerprint"), as_json=as_json, nothing="")
    output.say(f"made {place}: keep a copy of it, apart from the database's backups")


@keys.command("list", epilog=example("keys list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the keys that this host holds, and those that the database was written with."""
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
    """Make a new key of PURPOSE, which is used for all that is new; the older ones stay, for what is old."""
    with session.opened() as work:
        place = work.settings.keyring_path
        with _alone(work.engine) as connection:
            # Read anew under the lock: another `keys new` may have written it meanwhile.
            old = keyrings.load_keyring(place)
            check_keys(connection, old)
            ring = old.with_new(purpose, datetime.now(UTC))
            added = Keyring([ring.current(purpose)])
            _record(connection, ring, added, place, old)
    output.row(_listed(added, ring)[0], as_json=as_json)
    output.say(
        f"now copy {place} to every other host before you change anything else: a host that lacks the new key "
        "answers 503. Running processes read it by themselves; restart them so that they use it for what they "
        "write"
    )


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A transaction in which nobody else writes down keys."""
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE keys IN EXCLUSIVE MODE"))
        yield connection


def _record(connection: Connection, ring: Keyring, added: Keyring, place: Path, old: Keyring | None) -> None:
    """Write down the fingerprints of what is added, the audit rows, and last the file."""
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
    ring.save(place)
    try:
        connection.commit()
    except BaseException:
        # What the database does not know of may not be used.
        if old is None:
            place.unlink()
        else:
            old.save(place)
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
