"""Opens PostgreSQL through SQLAlchemy: URLs, connection settings, and what may be said of an error.

May not hold queries.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from receiver.errors import ConfigurationError

# A statement that waits longer than this on our own tables is in trouble; the request that caused it is gone by then.
_TIMEOUTS: Final = "-c timezone=UTC -c idle_in_transaction_session_timeout=600000"


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


def connect_arguments(statement_timeout: float | None) -> dict[str, str | int]:
    """libpq's settings for our connections; `statement_timeout` in seconds."""
    options = _TIMEOUTS if statement_timeout is None else f"{_TIMEOUTS} -c statement_timeout={int(statement_timeout * 1000)}"
    return {"options": options, "connect_timeout": 3, "keepalives_idle": 5, "keepalives_interval": 2,
            "keepalives_count": 3, "application_name": "redox-receiver"}


def open_engine(url: str, *, pooled: bool = True, pool_size: int = 5, statement_timeout: float | None = None) -> Engine:
    """An engine whose errors never quote a row: parameters are hidden; see also `describe`."""
    arguments = connect_arguments(statement_timeout)
    pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 4, "pool_pre_ping": True} if pooled else {
        "poolclass": NullPool}
    engine = create_engine(normalise(url), hide_parameters=True, connect_args=arguments, **pool)

    @event.listens_for(engine, "handle_error")
    def _hide(context: ExceptionContext) -> None:
        # PostgreSQL quotes row values in DETAIL and CONTEXT, which SQLAlchemy's hide_parameters leaves in the text.
        for exc in (context.original_exception, context.sqlalchemy_exception):
            if exc is not None:
                exc.args = (describe(exc),)

    return engine


def sqlstate(exc: BaseException) -> str | None:
    """PostgreSQL's five-character code of an error of psycopg or SQLAlchemy, or None (the connection was lost)."""
    original = exc.orig if isinstance(exc, DBAPIError) else exc
    return getattr(original, "sqlstate", None)


def describe(exc: BaseException) -> str:
    """All that may be said of a database error: its class and code. Its text may quote a patient."""
    original = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
    return f"{type(original).__name__} {sqlstate(exc) or 'no SQLSTATE'}"
