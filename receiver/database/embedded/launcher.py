"""Create the embedded cluster with initdb, and start its postmaster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from receiver.database.embedded.accounts import ServerAccount, child_arguments
from receiver.database.embedded.binaries import usable_binaries
from receiver.database.embedded.data_directory import DataDirectory, sync
from receiver.database.embedded.postmaster import KILL_TIMEOUT, is_postgres, within
from receiver.database.embedded.server_settings import ENVIRONMENT, PORT, ROLE
from receiver.errors import ConfigurationError, Conflict

_INITDB_TIMEOUT = 300.0  # seconds

# What a line of the log says, and what that means.
_CAUSES = (
    ("No space left on device", "the disk is full"),
    ("Cannot allocate memory", "the machine refuses the memory it asks for"),
    ("could not create shared memory", "the machine refuses the shared memory it asks for"),
    ("pre-existing shared memory", "processes of an earlier run still use this cluster"),
    ("Read-only file system", "the file system is read-only"),
    ("Permission denied", "its account may not read or write something it needs"),
    ("lock file", "another server uses this cluster or its socket"),
    ("could not bind", "its socket cannot be made in that directory"),
    ("incompatible", "the cluster was made by another PostgreSQL"),
    ("pg_control", "its files are damaged or missing: restore a backup (`redox-receiver db restore DIR`)"),
    ("checkpoint record", "its files are damaged or missing: restore a backup (`redox-receiver db restore DIR`)"),
    ("PANIC", "its files are damaged or missing: restore a backup (`redox-receiver db restore DIR`)"),
)


def launch(directory: DataDirectory, options: Mapping[str, str]) -> int:
    """Start a postmaster, and create the cluster if there is none. Returns the process id.

    Call it when none is alive. `options`: the server's settings.
    """
    account = directory.account()
    directory.move_if_closed(account)
    programs = usable_binaries(account, directory.home())
    if directory.has_cluster():
        _check_version(directory.cluster, programs)
    else:
        _initialize(directory, programs, account, synced=options["fsync"] != "off")
    _clear_remains(directory)
    socket = directory.socket_directory(account)
    settings = {**options, "unix_socket_directories": str(socket)}
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with directory.opened_log() as output:
        # The shell leaves the postmaster an orphan in its own session: no Ctrl-C at this terminal reaches it, and no
        # process has to wait for it.
        done = subprocess.run(
            ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", programs / "postgres", "-D", directory.cluster, *arguments],
            cwd=directory.cluster,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            check=True,
            start_new_session=True,
            **child_arguments(account),
        )
    return int(done.stdout)


def cause_of_failure(log_path: Path, logged: int) -> str:
    """Return a general description of what was logged after byte `logged`: log lines themselves are not shown."""
    with log_path.open("rb") as lines:
        lines.seek(logged)
        text = lines.read(1 << 20).decode("utf-8", "replace")
    known = next((cause for words, cause in _CAUSES if words in text), "the cause is in its log")
    return f"{known}; see {log_path}"


def _check_version(cluster: Path, programs: Path) -> None:
    made_by = (cluster / "PG_VERSION").read_text("ascii").strip()
    installed = (
        subprocess.run(
            [programs / "postgres", "--version"], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        .stdout.split()[-1]
        .partition(".")[0]
    )
    if made_by != installed:
        raise ConfigurationError(
            f"{cluster} was made by PostgreSQL {made_by}, and the one installed is {installed}: "
            "run `redox-receiver db backup DIR` with the redox-receiver[embedded] that made it, move that "
            "directory away, then run `redox-receiver db restore DIR` with this one"
        )


def _initialize(directory: DataDirectory, programs: Path, account: ServerAccount | None, *, synced: bool) -> None:
    """Create the cluster in a temporary directory and move it into place whole: a killed initdb leaves nothing."""
    home = directory.home()
    if directory.cluster.is_dir() and any(directory.cluster.iterdir()):
        raise ConfigurationError(f"{directory.cluster} holds files, but no PostgreSQL cluster: move them away")
    for left in home.glob("postgres.new-*"):
        shutil.rmtree(left, ignore_errors=True)  # its initdb may still run, and then fails
    fresh = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=home))
    if account is not None:
        os.chown(fresh, account.uid, account.gid)
    logged = directory.log_path.stat().st_size if directory.log_path.exists() else 0
    with directory.opened_log() as output:
        code = subprocess.run(
            [
                programs / "initdb",
                "--pgdata",
                fresh,
                "--username",
                ROLE,
                "--auth-local=trust",
                "--auth-host=reject",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--data-checksums",
                "--no-instructions",
                *([] if synced else ["--no-sync"]),
            ],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=_INITDB_TIMEOUT,
            **child_arguments(account),
            check=False,
        ).returncode
    if code != 0:
        raise ConfigurationError(
            f"the embedded PostgreSQL cannot be created: {cause_of_failure(directory.log_path, logged)}"
        )
    fresh.rename(directory.cluster)
    sync(home)


def _clear_remains(directory: DataDirectory) -> None:
    """Remove the remains of a killed postmaster. Call it when none is alive.

    Its child processes may still use its shared memory, and its lock files hold numbers that other processes may
    have now: PostgreSQL would refuse to start for either.
    """
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    left = [pid for pid in pids if is_postgres(pid, directory.cluster)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not within(KILL_TIMEOUT, lambda: not any(is_postgres(pid, directory.cluster) for pid in left)):
        raise Conflict(f"processes of an earlier PostgreSQL still use {directory.cluster}: {left}")
    socket = directory.socket()
    if socket is not None:
        (socket / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
    (directory.cluster / "postmaster.pid").unlink(missing_ok=True)
