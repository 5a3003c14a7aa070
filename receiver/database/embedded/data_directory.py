"""Where the embedded cluster is: in the data directory, or elsewhere if PostgreSQL's account cannot enter that.

The data directory holds: `postgres/` (the cluster), `postgres-socket/`, `postgres.log`, three lock files, and
`postgres.elsewhere`. The last one exists if root runs the receiver and PostgreSQL's account cannot enter the data
directory: it names the directory of the first two.

Must not change the mode or the owner of a directory that it has not created.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from receiver.database.embedded.accounts import ServerAccount, account_of, choose_account, first_closed
from receiver.database.embedded.server_settings import PORT
from receiver.errors import ConfigurationError

# struct sockaddr_un holds 108 bytes with the closing NUL.
_SOCKET_PATH_BYTES = 107

# Both PostgreSQL's list setting and libpq's list of hosts split on characters that a path may contain.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")

# Where root keeps what the account cannot reach. It survives a reboot, unlike the temporary directory.
ELSEWHERE = Path("/var/lib")

log = logging.getLogger(__name__)


class DataDirectory:
    """The data directory `data_dir`, its cluster's directories, and its lock files.

    `account_name`: the account that PostgreSQL runs under when root starts it, None for the default.
    """

    def __init__(self, data_dir: Path, account_name: str | None) -> None:
        self.path = Path(data_dir).resolve()
        self._account_name = account_name
        self._pointer = self.path / "postgres.elsewhere"
        self.log_path = self.path / "postgres.log"

    @property
    def cluster(self) -> Path:
        """The cluster's own directory, in the data directory or where `postgres.elsewhere` says."""
        return self.home() / "postgres"

    def has_cluster(self) -> bool:
        """Return whether the cluster exists."""
        return (self.cluster / "PG_VERSION").is_file()

    def make(self) -> None:
        """Create it if it does not exist: 0700, and as root 0710 with the account's group."""
        with self.explain_os_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                return
            if os.geteuid() == 0:
                _allow_group(self.path, choose_account(self._account_name))

    def account(self) -> ServerAccount | None:
        """Return the account to run under: None for the current user, if that is not root."""
        owner = self.cluster.stat() if self.has_cluster() else None
        if os.geteuid() != 0:
            if owner is not None and owner.st_uid != os.geteuid():
                raise self.not_ours()
            return None
        chosen = choose_account(self._account_name)
        if owner is None or chosen.uid == owner.st_uid:
            return chosen
        if owner.st_uid == 0 or self._account_name is not None:
            raise ConfigurationError(
                f"{self.cluster} belongs to user id {owner.st_uid}, and PostgreSQL is to run as {chosen.name}: give "
                "that directory and all in it to the account, or name its owner in RECEIVER_POSTGRES_ACCOUNT"
            )
        return account_of(owner.st_uid, owner.st_gid)

    def home(self) -> Path:
        """Return the directory that holds the cluster."""
        try:
            home = Path(self._pointer.read_text("utf-8").strip())
        except (FileNotFoundError, NotADirectoryError):
            return self.path
        except PermissionError as exc:
            raise self.not_ours() from exc
        try:
            belongs_to = (home / "data-directory").read_text("utf-8").strip()
        except OSError as exc:
            # Never create an empty cluster in the place of a lost one.
            raise ConfigurationError(
                f"the database of {self.path} is kept in {home} (see {self._pointer}), which cannot be read: "
                f"restore it, or, to begin with an empty database, remove {self._pointer}"
            ) from exc
        if belongs_to != str(self.path):
            raise ConfigurationError(
                f"{home} holds the database of {belongs_to}: if that directory was moved to {self.path}, write "
                f"the new path into {home / 'data-directory'}; if it was copied, remove {self._pointer}"
            )
        return home

    def move_if_closed(self, account: ServerAccount | None) -> None:
        """Choose another directory when the account cannot enter the data directory."""
        if account is None or (closed := first_closed(account, self.home())) is None:
            return
        if self.has_cluster():
            raise ConfigurationError(
                f"the account {account.name}, which PostgreSQL runs under, cannot enter {closed}: give it "
                "access, or set DATABASE_URL"
            )
        name = f"redox-receiver-{self._digest()}-"
        elsewhere = Path(tempfile.mkdtemp(prefix=name, dir=ELSEWHERE))
        _allow_group(elsewhere, account)
        if (still := first_closed(account, elsewhere)) is not None:
            elsewhere.rmdir()
            raise ConfigurationError(
                f"the account {account.name}, which PostgreSQL runs under, can enter neither {closed} nor {still}: "
                "choose another RECEIVER_DATA_DIR or RECEIVER_POSTGRES_ACCOUNT, or set DATABASE_URL"
            )
        (elsewhere / "data-directory").write_text(f"{self.path}\n", "utf-8")
        written = self._pointer.with_suffix(".new")
        written.write_text(f"{elsewhere}\n", "utf-8")
        written.replace(self._pointer)
        for changed in (elsewhere, elsewhere.parent, self.path):
            sync(changed)
        log.warning(
            "the account %s cannot enter %s, so the database of %s is kept in %s: back up that directory too",
            account.name,
            closed,
            self.path,
            elsewhere,
        )

    def socket_directory(self, account: ServerAccount | None) -> Path:
        """Return the private directory for the socket, created if it is missing.

        A path that is too long, or would have to be quoted, is replaced by one under the temporary directory.
        """
        name = f"redox-receiver-{self._digest()}"
        others = [Path(root).resolve() / name for root in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]  # noqa: S108  checked below
        for socket in (self.home() / "postgres-socket", *others):
            path = str(socket / f".s.PGSQL.{PORT}")
            if len(os.fsencode(path)) > _SOCKET_PATH_BYTES or not _PLAIN_PATH.fullmatch(path):
                continue
            if socket in others and not (socket.parent.is_dir() and _safe_to_share(socket.parent)):
                continue
            if account is None or first_closed(account, socket.parent) is None:
                return _private(socket, account)
        raise ConfigurationError(
            f"PostgreSQL's socket fits neither into {self.home()} nor under the temporary directory: a path of at "
            f"most {_SOCKET_PATH_BYTES - 40} plain characters is needed; choose another RECEIVER_DATA_DIR or TMPDIR"
        )

    def _digest(self) -> str:
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]

    def postmaster_file(self) -> list[str]:
        """Return the lines of `postmaster.pid`, none if there is no such file."""
        try:
            return (self.cluster / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as exc:
            raise self.not_ours() from exc

    def socket(self) -> Path | None:
        """Return the socket's directory as the postmaster recorded it."""
        lines = self.postmaster_file()
        return Path(lines[4]) if len(lines) > 4 and lines[4] else None

    def not_ours(self) -> ConfigurationError:
        """Return the error for files of another account."""
        return ConfigurationError(
            f"the embedded PostgreSQL of {self.path} belongs to another account: run this as that account or root"
        )

    @contextmanager
    def opened_log(self) -> Iterator[int]:
        """Open the log for appending. PostgreSQL inherits it, so that its account need not reach the file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(self.log_path, flags, 0o600)
        try:
            yield opened
        finally:
            os.close(opened)

    @contextmanager
    def opened_lock(self, name: str) -> Iterator[int]:
        """Open a lock file, and release its lock afterwards."""
        with self.explain_os_errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = os.open(self.path / name, flags, 0o600)
        try:
            yield opened
        finally:
            fcntl.flock(opened, fcntl.LOCK_UN)  # closing alone would leave the lock to children forked meanwhile
            os.close(opened)

    @contextmanager
    def explain_os_errors(self) -> Iterator[None]:
        """Raise ConfigurationError, with how to fix it, instead of the errors of the system and of child processes."""
        try:
            yield
        except (OSError, subprocess.SubprocessError) as exc:
            what = exc if isinstance(exc, OSError) else type(exc).__name__
            raise ConfigurationError(
                f"the embedded PostgreSQL of {self.path} cannot be used ({what}): fix that, choose another "
                "RECEIVER_DATA_DIR, or set DATABASE_URL"
            ) from exc


def _allow_group(made: Path, account: ServerAccount) -> None:
    """Let the account's group pass through a directory that was just created, but not list it."""
    os.chown(made, 0, account.gid)
    made.chmod(0o710)


def sync(directory: Path) -> None:
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


def _private(directory: Path, account: ServerAccount | None) -> Path:
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
