"""Database backups, made with PostgreSQL's own pg_dump, and their manifests.

A backup does not contain the keyring: one is useless without the other.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from hashlib import file_digest
from hmac import compare_digest
from pathlib import Path
from typing import Any, Final

from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, select

from receiver import __version__
from receiver.database import migrations
from receiver.errors import ConfigurationError, ReceiverError
from receiver.keyring import Keyring
from receiver.protocol.digests import hmac_sha256
from receiver.storage import schema
from receiver.storage.evidence.macs import encode
from receiver.storage.operations.postgres_programs import find_program, run_program, server_version

DUMP: Final = "database.dump"
MANIFEST: Final = "backup.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """The content of `backup.json`, next to a dump. `keys`: id, purpose and fingerprint of each key that it needs.

    `mac`: hexadecimal, over all other fields, under the key `mac_key`. With the dump's digest it covers the dump.
    """

    made_at: datetime
    version: str
    revision: str
    postgresql: int
    pg_dump: int
    size: int
    sha256: str
    keys: tuple[dict[str, str], ...]
    mac_key: str
    mac: str = ""

    def signed(self, keyring: Keyring) -> str:
        """Return the MAC that it must have. Raises UnknownKey."""
        fields = _fields(self)
        del fields["mac"]
        return hmac_sha256(keyring[self.mac_key].derive("backup manifest"), encode(fields)).hex()


def dump(engine: Engine, keyring: Keyring, directory: Path, now: datetime) -> Backup:
    """Write a backup into `directory`, which is created (0700) or empty.

    Raises ConfigurationError: the directory is not empty, pg_dump is missing, too old, or fails.
    """
    with engine.connect() as connection:
        revision, server, keys = migrations.current(connection), server_version(connection), _keys(connection)
    if revision is None:
        raise ConfigurationError("there is nothing to back up: this database was never migrated")
    program, version = find_program("pg_dump", server)
    if directory.exists() and any(directory.iterdir()):
        raise ConfigurationError(f"{directory} is not empty: name a new directory for the backup")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / DUMP
    try:
        run_program([program, "--format=custom", "--no-password", f"--file={path}"], engine, directory / "pg_dump.log")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    made = Backup(
        made_at=now,
        version=__version__,
        revision=revision,
        postgresql=server,
        pg_dump=version,
        size=path.stat().st_size,
        sha256=_sha256(path),
        keys=keys,
        mac_key=keyring.current("mac").id,
    )
    made = replace(made, mac=made.signed(keyring))
    descriptor = os.open(directory / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(_fields(made), file, indent=1)
    return made


def _fields(backup: Backup) -> dict[str, Any]:
    """Return the fields as in the file."""
    return asdict(backup) | {"made_at": backup.made_at.isoformat(), "keys": list(backup.keys)}


def read_manifest(directory: Path) -> Backup:
    """Return the manifest of the backup in `directory`, not yet verified. Raises ConfigurationError."""
    try:
        fields: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        return Backup(**fields | {"made_at": datetime.fromisoformat(fields["made_at"]), "keys": tuple(fields["keys"])})
    except OSError as exc:
        raise _unreadable(directory, exc) from exc
    except (KeyError, TypeError, ValueError):
        raise ConfigurationError(f"{directory / MANIFEST} is damaged: take another backup") from None


def _unreadable(directory: Path, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{directory} holds no readable backup ({exc.strerror}: {exc.filename}): name "
        "the directory that `db backup` wrote"
    )


def prove(directory: Path, found: Backup, keyring: Keyring) -> None:
    """Raise ConfigurationError unless the backup is unchanged since `db backup`, and this code can read it.

    The manifest's MAC is checked first. A dump is run as SQL, so a dump made without the keyring must never be opened.
    """
    try:
        genuine = compare_digest(found.signed(keyring), found.mac)
    except (ReceiverError, TypeError):
        genuine = False
    if not genuine:
        raise ConfigurationError(
            f"{directory / MANIFEST} was changed, or made by something without this keyring (its "
            "MAC does not hold): take another backup"
        )
    try:
        whole = _sha256(directory / DUMP) == found.sha256
    except OSError as exc:
        raise _unreadable(directory, exc) from exc
    if not whole:
        raise ConfigurationError(
            f"{directory / DUMP} is not what was backed up (its SHA-256 differs): take another backup"
        )
    try:
        ScriptDirectory.from_config(migrations.config()).get_revision(found.revision)
    except CommandError:
        raise ConfigurationError(
            f"the backup is at revision {found.revision}, which redox-receiver {__version__} does "
            f"not know: install {found.version} or later"
        ) from None


def _keys(connection: Connection) -> tuple[dict[str, str], ...]:
    table = schema.keys
    rows = connection.execute(select(table.c.id, table.c.purpose, table.c.fingerprint).order_by(table.c.id)).mappings()
    return tuple({name: str(value) for name, value in row.items()} for row in rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
