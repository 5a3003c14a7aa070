"""The table `keys`: which keys of the keyring a database was written with, and which of them are active.

Must not hold key material: only ids, purposes and fingerprints. A key passes three stages. Pending: recorded, and being
copied to every host; nothing is written with it. Active: the newest active key of a purpose seals and signs on every
host. Retired: nothing stored needs it any longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from receiver.errors import ConfigurationError, Conflict, NotFound
from receiver.keyring import Keyring
from receiver.storage import schema

# A process that was not seen for this long has stopped: see receiver.storage.operations.queries.process_queries.
_SILENT: Final = "interval '60 seconds'"
# The columns that hold the id of a key that a row was signed, sealed or digested under.
KEY_COLUMNS: Final = frozenset(
    {"mac_key", "secret_key", "payload_key", "error_key", "request_key", "answer_key", "note_key", "seal_key"}
)
_PROCESSES: Final = f"""
SELECT role, host, pid, started_at, keys FROM listeners
WHERE stopped_at IS NULL AND seen_at > now() - {_SILENT}
UNION ALL
SELECT 'worker', host, pid, started_at, keys FROM workers WHERE seen_at > now() - {_SILENT}
ORDER BY 1, 2, 3"""


def record_keys(connection: Connection, keyring: Keyring) -> None:
    """Store the fingerprints of keys that are new to the database, each as active as the keyring says."""
    for key in keyring.keys:
        connection.execute(
            insert(schema.keys)
            .on_conflict_do_nothing()
            .values(
                id=key.id,
                purpose=key.purpose,
                fingerprint=key.fingerprint,
                activated_at=None if key.pending else func.now(),
            )
        )


def check_keys(connection: Connection, keyring: Keyring) -> None:
    """Have `keyring` write with the keys that the database calls active.

    Raises ConfigurationError if this host lacks an active key, or has a different key under a recorded id. A pending
    or a retired key may be missing.
    """
    recorded = connection.execute(select(schema.keys)).all()
    needed = {row.id for row in recorded if row.activated_at is not None and row.retired_at is None}
    if any(key_id not in keyring for key_id in needed):
        keyring.refresh()
    held = {key.id: key.fingerprint for key in keyring.keys}
    for row in recorded:
        if row.id not in held and row.id not in needed:
            continue
        if held.get(row.id) != row.fingerprint:
            what = "lacks" if row.id not in held else "holds another"
            raise ConfigurationError(
                f"this host {what} key {row.id}: restore the keyring file that belongs to this "
                "database (RECEIVER_KEYRING)"
            )
    if not recorded:
        raise ConfigurationError("this database has no keys on record: run `redox-receiver keys init`")
    keyring.activate(needed)


def activate(connection: Connection, key_id: str) -> None:
    """Make a pending key active; every process follows within a second.

    Raises NotFound; Conflict if the key is not pending, or if a live process does not hold it yet.
    """
    row = _row(connection, key_id)
    if row.retired_at is not None:
        raise Conflict(f"key {key_id} was retired: create another with `redox-receiver keys new {row.purpose}`")
    if row.activated_at is not None:
        raise Conflict(f"key {key_id} is active already")
    missing = lacking(connection, key_id)
    if missing:
        named = ", ".join(missing)
        raise Conflict(
            f"not every running process holds key {key_id} yet: {named}. Copy the keyring file to every host; "
            "processes read it within five seconds. A process that has stopped is forgotten after a minute"
        )
    table = schema.keys
    connection.execute(update(table).where(table.c.id == key_id).values(activated_at=func.now()))
    # So that every process compares its keys with the database's.
    connection.execute(text("UPDATE registry_version SET version = version + 1"))


def lacking(connection: Connection, key_id: str) -> list[str]:
    """Return the running processes that do not hold the key: role, process id and host of each."""
    return [_named(process) for process in _processes(connection) if key_id not in process.keys]


def retire(connection: Connection, key_id: str) -> None:
    """Record that nothing needs a key any longer.

    Raises NotFound; Conflict if it is the key that its purpose is written with, if a live process started before a
    newer key was activated (it may still write with this one), or if a row was written with it.
    """
    row = _row(connection, key_id)
    if row.retired_at is not None:
        raise Conflict(f"key {key_id} is retired already")
    table = schema.keys
    since = connection.scalar(
        select(func.max(table.c.activated_at)).where(
            table.c.purpose == row.purpose, table.c.id != key_id, table.c.retired_at.is_(None)
        )
    )
    if row.activated_at is not None:
        if since is None or since <= row.activated_at:
            raise Conflict(f"{row.purpose} data is written with key {key_id}: activate a newer key first")
        early = [_named(process) for process in _processes(connection) if process.started_at <= since]
        if early:
            raise Conflict(
                f"these processes started before the newer key was activated: {', '.join(early)}. Restart them first"
            )
        uses = {name: count for name, count in counts(connection, key_id) if count}
        if uses:
            named = ", ".join(f"{count} in {name}" for name, count in uses.items())
            raise Conflict(f"key {key_id} is still needed by stored rows: {named}")
    connection.execute(update(table).where(table.c.id == key_id).values(retired_at=func.now()))


def counts(connection: Connection, key_id: str) -> Iterator[tuple[str, int]]:
    """Yield (table.column, number of rows under the key) for each column that names keys. Reads whole tables."""
    for table in schema.metadata.sorted_tables:
        for column in table.columns:
            if column.name in KEY_COLUMNS:
                number = connection.scalar(select(func.count()).select_from(table).where(column == key_id))
                yield f"{table.name}.{column.name}", number or 0


def _row(connection: Connection, key_id: str) -> Any:
    row = connection.execute(select(schema.keys).where(schema.keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound(f"this database has no key {key_id} on record: see `redox-receiver keys list`")
    return row


def _named(process: Any) -> str:
    return f"{process.role} {process.pid} on {process.host}"


def _processes(connection: Connection) -> list[Any]:
    return list(connection.execute(text(_PROCESSES)))
