"""PostgreSQL's own programs, pg_dump and pg_restore: finds the right version and runs it.

Must not print what they print, which may quote a row: it is written to a file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine

from receiver.database.embedded.binaries import binaries
from receiver.errors import ConfigurationError

# Debian installs each version's programs here, and puts only a wrapper on the path.
_INSTALLED: Final = Path("/usr/lib/postgresql")


def server_version(connection: Connection) -> int:
    """Return the server's major version."""
    return int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000


def find_program(name: str, at_least: int) -> tuple[Path, int]:
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


def run_program(command: list[str | Path], engine: Engine, log: Path, *, role: tuple[str, str] | None = None) -> None:
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


def dump_contents(program: Path, dump: Path) -> list[str]:
    """Return what the dump holds, as lines that `pg_restore --use-list` takes. `program`: pg_restore."""
    done = subprocess.run([program, "--list", dump], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigurationError(f"{dump} cannot be read (pg_restore --list failed): take another backup")
    return done.stdout.splitlines(keepends=True)


def _version(program: Path) -> int | None:
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"\) (\d+)", version)
    return int(found[1]) if found else None
