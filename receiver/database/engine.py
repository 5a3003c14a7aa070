"""Opens PostgreSQL through SQLAlchemy: URLs, connection settings, and what may be said of an error.

May not hold queries.
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

# A transaction that idles for so long has lost its client, and keeps locks that others wait for. A client whose host is
# cut off says no more, not even that it is gone: the server looks, as we do. Of a Unix socket these say nothing.
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
    """`url` for SQLAlchemy with psycopg; `postgres://` and `postgresql://` are taken as people write them.

    Raises ConfigurationError.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError("DATABASE_URL: write postgresql://USER:PASSWORD@HOST/NAME") from None
    if parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ConfigurationError(f"DATABASE_URL: {parsed.drivername} is no PostgreSQL; write postgresql://…")
    return parsed.set(drivername="postgresql+psycopg")


def connect_arguments(statement_timeout: float | None, **session: str) -> dict[str, str | int]:
    """libpq's settings for our connections; `statement_timeout` in seconds, `session` as PostgreSQL names them.

    A network that swallows everything is found out within ten seconds, whether we wait for an answer (keepalives) or
    for our own bytes to be taken (tcp_user_timeout, RFC 5482); by the server too.
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
    """An engine whose errors never quote a row: parameters are hidden; see also `describe`."""
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 4, "pool_pre_ping": True}
    return _engine(normalise(url), connect_arguments(statement_timeout), **pool)


def dedicated(engine: Engine, *, patience: float) -> Engine:
    """An engine at the address of `engine` for one connection that is kept; a statement may take `patience` seconds.

    Without a pool: to try whether an idle connection still lives is to wait for ever for a frozen server. What waits
    for a lock is given up by the server too, for it does not see that we have hung up. A commit is on disk whatever
    the server's default.
    """
    timeout = str(int(patience * 1000))
    session = connect_arguments(patience, idle_in_transaction_session_timeout=timeout, synchronous_commit="on")
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
    """PostgreSQL's five-character code of an error of psycopg or SQLAlchemy, or None (the connection was lost)."""
    original = exc.orig if isinstance(exc, DBAPIError) else exc
    return getattr(original, "sqlstate", None)


def describe(exc: BaseException) -> str:
    """All that may be said of a database error: its class and code. Its text may quote a patient.

    The code is the SQLSTATE; of a connection that failed, which has none, one of receiver.database.connection_errors.
    """
    original = _original(exc)
    return f"{type(original).__name__} {sqlstate(exc) or connection_code(exc) or 'no SQLSTATE'}"


def connection_code(exc: BaseException) -> str | None:
    """Why a connection of psycopg or SQLAlchemy failed, as a code of receiver.database.connection_errors; None: it did not."""
    original = _original(exc)
    # An option in the URL that there is not is a ProgrammingError; most of these are about something else.
    if not isinstance(original, psycopg.OperationalError | psycopg.ProgrammingError) or original.sqlstate is not None:
        return None
    code = getattr(original, _CODE, None) or connection_errors.code_of(str(original))
    return None if code == connection_errors.LOST and isinstance(original, psycopg.ProgrammingError) else code


def _original(exc: BaseException) -> BaseException:
    return exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc


def _keep_code(exc: BaseException) -> None:
    """Note the code while the text that it is read from is still there."""
    if (code := connection_code(exc)) is not None:
        setattr(_original(exc), _CODE, code)
