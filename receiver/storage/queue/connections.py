"""The two connections of a handler process: one records outcomes, the other runs a plugin's statements.

Must not hold queries (see the other modules of receiver.storage.queue). Each connection is opened on first use, and
opened again after it is lost.
"""

from __future__ import annotations

import traceback
from typing import Any, Final

from psycopg import Error as PsycopgError
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from receiver.database.engine import open_engine, sqlstate
from receiver.errors import ReceiverError, WorkAborted

# If the process is killed while a statement runs, its locks must not stay: the server checks that the client is alive.
# A server whose operating system cannot check this refuses the setting.
_SESSION: Final = "SET client_connection_check_interval = '2s'"
# A handler may stay idle in its transaction until its timeout. A session that idles for longer belongs to a frozen
# host, and keeps locks that block the worker that took over its lane.
_SET_IDLE_TIMEOUT: Final = "SELECT set_config('idle_in_transaction_session_timeout', %s, false)"
_DEFAULT_TIMEOUT: Final = 7200.0
# The frames of a failed statement are the plugin's: without those of the libraries below it and of the receiver above
# it.
_LIBRARIES: Final = frozenset({"sqlalchemy", "psycopg", "threading", "runpy", "__main__"})
_MAX_FRAMES: Final = 50


class CommitNotAllowed(ReceiverError):
    """The plugin tried to commit, but context.connection is committed with the delivery's success.

    Return instead, or use begin_nested() for a savepoint.
    """


class OutcomeConnection:
    """An autocommit connection: each statement is its own transaction."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, pooled=False)
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """Return the connection. Raises SQLAlchemyError when it cannot be opened."""
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._connection

    def drop(self) -> None:
        """Discard the connection: after an error its state is unknown."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


class PluginConnection:
    """The connection of a plugin. Each run is one transaction: begun on first use, and ended only by the receiver."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, pooled=False)
        self._connection: Connection | None = None
        self._ours = False
        self.used = False
        self.timeout = _DEFAULT_TIMEOUT  # seconds that the run may take
        self._server_timeout: float | None = None  # the timeout that the server has
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "commit", self._committing)
        event.listen(self._engine, "handle_error", self._note_error)
        self._failed: WorkAborted | None = None  # the last statement that failed

    def connection(self) -> Connection:
        """Return the connection of this run. Raises SQLAlchemyError when it cannot be opened."""
        if self._connection is None or self._connection.closed:
            self._connection, self._server_timeout = self._engine.connect(), None
        self.used = True
        if not self._connection.in_transaction():
            if self._server_timeout != self.timeout:
                self._set_idle_timeout(self._connection)
            # Begin here, so that an ORM session bound to the connection joins the transaction and does not commit it.
            self._connection.begin()
        return self._connection

    def _set_idle_timeout(self, connection: Connection) -> None:
        """Set how long the server lets a transaction stay idle."""
        self._ours = True
        try:
            with connection.begin():
                connection.exec_driver_sql(_SET_IDLE_TIMEOUT, (str(int(self.timeout * 1000)),))
        finally:
            self._ours = False
        self._server_timeout = self.timeout

    def check(self) -> None:
        """Raise WorkAborted, with the place of the statement, if a statement failed and the handler went on."""
        if self.used and self._connection is not None and not self._connection.closed:
            driver: Any = self._connection.connection.driver_connection
            if driver.info.transaction_status is TransactionStatus.INERROR:
                raise self._failed or WorkAborted(None, ())

    def _note_error(self, context: ExceptionContext) -> None:
        """Keep the place of the failed statement: it is lost once the handler has caught the error."""
        frames = [
            f"{module}:{line}:{frame.f_code.co_name}"
            for frame, line in traceback.walk_stack(None)
            if (module := str(frame.f_globals.get("__name__", "?"))).partition(".")[0] not in _LIBRARIES
            and not module.startswith(("receiver.handlers.", "receiver.worker.", "receiver.storage."))
        ]
        self._failed = WorkAborted(sqlstate(context.original_exception), tuple(reversed(frames))[-_MAX_FRAMES:])

    def commit(self) -> None:
        """Commit the run's work, and what was recorded on the same connection. Raises SQLAlchemyError."""
        assert self._connection is not None
        self._ours = True
        try:
            self._connection.commit()
        finally:
            self._ours, self.used = False, False

    def rollback(self) -> None:
        """Roll back the run's work. A connection that cannot roll back is discarded."""
        self.used = False
        if self._connection is None or self._connection.closed:
            return
        try:
            self._connection.rollback()
            # If a plugin has tried to end the transaction, SQLAlchemy no longer tracks it, but the server still has it
            # open.
            self._connection.connection.rollback()
        except (SQLAlchemyError, PsycopgError):
            self.drop()

    def drop(self) -> None:
        """Discard the connection."""
        connection, self._connection = self._connection, None
        self.used = False
        if connection is not None and not connection.closed:
            connection.invalidate()
            connection.close()

    def _committing(self, _connection: Connection) -> None:
        if not self._ours:
            raise CommitNotAllowed


def lost(exc: SQLAlchemyError) -> bool:
    """Return whether the connection is lost, so that the result of the last commit is unknown."""
    return isinstance(exc, DBAPIError) and exc.connection_invalidated


def _prepare(driver: Any, _record: object) -> None:
    try:
        driver.execute(_SESSION)
        driver.commit()
    except PsycopgError:
        driver.rollback()
