"""What a command works with: settings, keyring, database, and who it is that acts.

May not decide anything of a command's. A database error leaves here as one of ours, without its text, for that may
quote a row.
"""

from __future__ import annotations

import logging
import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
from receiver.storage.registry.changes import RegistryChanges, check_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A command at work: the schema is one that this code runs on, and this host's keys are those of the database."""

    settings: Settings
    keyring: Keyring = field(repr=False)
    engine: Engine
    actor: str

    @property
    def registration(self) -> RegistryChanges:
        """The verbs that change the registry, in the name of whoever runs the command."""
        return RegistryChanges(self.engine, self.keyring, actor=self.actor)


@contextmanager
def opened() -> Iterator[Session]:
    """A session while the block runs.

    Raises ConfigurationError (settings, keyring, schema, keys: each with what fixes it), DatabaseUnavailable.
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
    """Raise ConfigurationError when the embedded PostgreSQL is meant, and was never made in the data directory."""
    if settings.database_url is None and not _cluster(settings).exists():
        raise ConfigurationError(
            f"there is no database in {settings.data_dir}: check --data-dir (RECEIVER_DATA_DIR), "
            "or run `redox-receiver up`, which makes one there"
        )


def _cluster(settings: Settings) -> Cluster:
    return Cluster(settings.data_dir, account=settings.postgres_account)


@contextmanager
def database(settings: Settings, *, make: bool = False) -> Iterator[Engine]:
    """An engine while the block runs: on DATABASE_URL, else on the embedded PostgreSQL, joined or started.

    That is made where it was not, if `make`. Raises DatabaseUnavailable instead of a database error, and
    ConfigurationError.
    """
    if not make:
        check_made(settings)
    if not structlog.is_configured():
        # Stdout is for the command's result alone, and stderr for one line that says what could not be done.
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
    """What an operator is told of a database error."""
    code = connection_code(exc)
    if code is None:
        return DatabaseUnavailable(f"PostgreSQL refuses a statement ({describe(exc)})", "its log says more")
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
    """Raise ConfigurationError when the schema is none that this code runs on."""
    with engine.connect() as connection:
        found = compatibility.schema_compatibility(connection)
    if not found.compatible:
        raise ConfigurationError(f"the schema is {found.message}")


def actor() -> str:
    """Who the audit names: the operating system's user, at this host."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
