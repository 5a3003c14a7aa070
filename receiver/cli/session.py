"""The session of a command: settings, keyring, database, and the actor for the audit log.

A database error becomes a ReceiverError without the original text, which may quote a row.

Must not implement a command.
"""

from __future__ import annotations

import logging
import os
import pwd
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy import URL, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.database import compatibility, connection_errors
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import connection_code, describe, open_engine
from receiver.errors import ConfigurationError, DatabaseUnavailable
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.key_records import check_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The session of a command. The schema is compatible, and the keyring matches the database."""

    settings: Settings
    keyring: Keyring = field(repr=False)
    engine: Engine
    actor: str

    @property
    def registration(self) -> RegistryChanges:
        """The operations that change the registry. The audit log names the actor."""
        return RegistryChanges(self.engine, self.keyring, actor=self.actor)


@contextmanager
def opened() -> Iterator[Session]:
    """Open a session for the block.

    Raises ConfigurationError (settings, keyring, schema or keys, with the fix), DatabaseUnavailable.
    """
    settings = table.load_settings()
    check_made(settings)
    keyring = keyrings.load_keyring(settings.keyring_path)
    with database(settings) as engine:
        check_schema(engine)
        with engine.connect() as connection:
            check_keys(connection, keyring)
        yield Session(settings=settings, keyring=keyring, engine=engine, actor=actor())


def check_made(settings: Settings) -> None:
    """Raise ConfigurationError when the embedded PostgreSQL is to be used, but does not exist in the data directory."""
    if settings.database_url is None and not _cluster(settings).exists():
        raise ConfigurationError(
            f"no database exists in {settings.data_dir}: check --data-dir (RECEIVER_DATA_DIR), "
            "or run `redox-receiver up`, which creates one"
        )


def _cluster(settings: Settings) -> Cluster:
    return Cluster(settings.data_dir, account=settings.postgres_account)


@contextmanager
def database(settings: Settings, *, make: bool = False) -> Iterator[Engine]:
    """Open an engine for the block: on DATABASE_URL, else on the embedded PostgreSQL, which is started if needed.

    With `make`, the embedded PostgreSQL is created if it does not exist. Raises ConfigurationError, and
    DatabaseUnavailable instead of a database error.
    """
    if not make:
        check_made(settings)
    if not structlog.is_configured():
        # Stdout is only for the result of the command, and stderr for one line with the error.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with _address(settings) as url:
        engine = open_engine(url, pool_size=2)
        try:
            yield engine
        except SQLAlchemyError as exc:
            raise _unavailable(exc, engine.url, settings) from exc
        finally:
            engine.dispose()


def _unavailable(exc: SQLAlchemyError, url: URL, settings: Settings) -> DatabaseUnavailable:
    """Convert a database error to the error that the operator sees."""
    code = connection_code(exc)
    if code is None:
        return DatabaseUnavailable(f"PostgreSQL refused a statement ({describe(exc)})", "see the log of PostgreSQL")
    problem, fix = connection_errors.explain(code, url)
    if settings.database_url is None:
        fix = f"see {_cluster(settings).log_path}"
    return DatabaseUnavailable(problem, fix)


@contextmanager
def _address(settings: Settings) -> Iterator[str]:
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
    else:
        with _cluster(settings).joined() as url:
            yield url


def check_schema(engine: Engine) -> None:
    """Raise ConfigurationError when the schema is not compatible with this release."""
    with engine.connect() as connection:
        found = compatibility.schema_compatibility(connection)
    if not found.compatible:
        raise ConfigurationError(f"the schema is {found.message}")


def actor() -> str:
    """The actor for the audit log: USER@HOST uid=N, with the user of the operating system.

    login_uid=N follows where the session began as another user (Linux: /proc/self/loginuid, which a process cannot set
    back), and sudo_user=NAME where sudo says whose command this is. Only the environment says the latter, so read it
    as a hint.
    """
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = f"uid-{uid}"
    words = [f"{user}@{socket.gethostname()}", f"uid={uid}"]
    login = _login_uid()
    if login is not None and login != uid:
        words.append(f"login_uid={login}")
    if _ACCOUNT.fullmatch(sudo := os.environ.get("SUDO_USER", "")):
        words.append(f"sudo_user={sudo}")
    return " ".join(words)


def _login_uid() -> int | None:
    """Return the user id with which the session was opened; None where that is not known."""
    try:
        number = int(_LOGIN_UID.read_text())
    except (OSError, ValueError):
        return None
    return None if number == _NO_LOGIN else number


_LOGIN_UID: Final = Path("/proc/self/loginuid")
_NO_LOGIN: Final = 2**32 - 1  # of a service, which nobody logged in to start
_ACCOUNT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
