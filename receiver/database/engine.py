"""SQLAlchemy engines for PostgreSQL: URLs, connection settings, and safe descriptions of errors.

Must not hold queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import psycopg
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from receiver.database import connection_errors
from receiver.errors import ConfigurationError

# A transaction that is idle for this long has lost its client, and keeps locks. A client whose host is cut off sends
# nothing, not even a close: both the server and the client check. These settings have no effect on a Unix socket.
_SESSION: Final = {
    "timezone": "UTC",
    "idle_in_transaction_session_timeout": "600000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


_CODE: Final = "receiver_connection_code"


def normalise(url: str) -> URL:
    """Return `url` for SQLAlchemy with psycopg. Accepts `postgres:

    ` and `postgresql:

    `.

    Raises ConfigurationError.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError("DATABASE_URL: write postgresql://USER:PASSWORD@HOST/NAME") from None
    if parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ConfigurationError(f"DATABASE_URL: {parsed.drivername} is not a PostgreSQL driver: use postgresql://…")
    return parsed.set(drivername="postgresql+psycopg")


def connect_arguments(statement_timeout: float | None, **session: str) -> dict[str, str | int]:
    """Return libpq's connection settings. `statement_timeout` in seconds, `session` as PostgreSQL names them.

    A network that drops all packets is detected within ten seconds, by client and server, whether an answer is awaited
    (keepalives) or bytes are unacknowledged (tcp_user_timeout, RFC 5482).
    """
    settings = _SESSION | session
    if statement_timeout is not None:
        settings["statement_timeout"] = str(int(statement_timeout * 1000))
    return {
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        "connect_timeout": 3,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "application_name": "redox-receiver",
    }


def open_engine(url: str, *, pooled: bool = True, pool_size: int = 5, statement_timeout: float | None = None) -> Engine:
    """Return an engine whose errors never quote a row: parameters are hidden; see also `describe`."""
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 4, "pool_pre_ping": True}
    return _engine(normalise(url), connect_arguments(statement_timeout), **pool)


def dedicated(engine: Engine, *, timeout: float) -> Engine:
    """Return an engine at the address of `engine`, for one long-lived connection. `timeout`: seconds for a statement.

    It has no pool, because testing an idle connection to a frozen server waits forever. The server also gives up
    statements that wait for a lock, because it does not notice that the client has hung up. A commit is on disk
    whatever the server's default.
    """
    milliseconds = str(int(timeout * 1000))
    session = connect_arguments(timeout, idle_in_transaction_session_timeout=milliseconds, synchronous_commit="on")
    return _engine(engine.url, session, poolclass=NullPool)


def _engine(url: URL, arguments: Mapping[str, str | int], **pool: Any) -> Engine:
    engine = create_engine(url, hide_parameters=True, connect_args=dict(arguments), **pool)

    @event.listens_for(engine, "handle_error")
    def _hide(context: ExceptionContext) -> None:
        # PostgreSQL quotes row values in DETAIL and CONTEXT, which SQLAlchemy's hide_parameters leaves in the text.
        for exc in (context.original_exception, context.sqlalchemy_exception):
            if exc is not None:
                _keep_code(exc)
                exc.args = (describe(exc),)
        if context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.params = None

    return engine


def sqlstate(exc: BaseException) -> str | None:
    """Return PostgreSQL's five-character code of an error of psycopg or SQLAlchemy; None: the connection was lost."""
    original = exc.orig if isinstance(exc, DBAPIError) else exc
    return getattr(original, "sqlstate", None)


def describe(exc: BaseException) -> str:
    """Return the safe description of a database error: its class and code. Its text may quote a patient.

    The code is the SQLSTATE, or for a failed connection one of receiver.database.connection_errors.
    """
    original = _original(exc)
    return f"{type(original).__name__} {sqlstate(exc) or connection_code(exc) or 'no SQLSTATE'}"


def connection_code(exc: BaseException) -> str | None:
    """Return why a connection of psycopg or SQLAlchemy failed, as a code of receiver.database.connection_errors, or
    None.
    """
    original = _original(exc)
    # An unknown option in the URL is a ProgrammingError; most other ProgrammingErrors have other causes.
    if not isinstance(original, psycopg.OperationalError | psycopg.ProgrammingError) or original.sqlstate is not None:
        return None
    code = getattr(original, _CODE, None) or connection_errors.code_of(str(original))
    return None if code == connection_errors.LOST and isinstance(original, psycopg.ProgrammingError) else code


def _original(exc: BaseException) -> BaseException:
    return exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc


def _keep_code(exc: BaseException) -> None:
    """Keep the code while the text that it is read from is available."""
    if (code := connection_code(exc)) is not None:
        setattr(_original(exc), _CODE, code)
