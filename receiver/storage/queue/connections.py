"""The two connections of a handler process: one for the records of runs, one in which a plugin does its work.

May not hold queries of ours (receiver.storage.queue.lanes). Both are opened when they are first needed, and again after they
were lost.
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
from receiver.errors import ReceiverError

# A process that was killed while its statement runs does not keep its locks: the server looks whether the client
# lives. Where the server's system cannot tell, it refuses the setting.
_SESSION: Final = "SET client_connection_check_interval = '2s'"
# A handler may think as long as its time-out lets it. One that idles for longer stands still with its whole host, and
# keeps locks that whoever does its work elsewhere waits for.
_IDLE: Final = "SELECT set_config('idle_in_transaction_session_timeout', %s, false)"
_LONGEST: Final = 7200.0
# Frames of a statement that failed are the plugin's, without those of the libraries below it and of ours above it.
_LIBRARIES: Final = frozenset({"sqlalchemy", "psycopg", "threading", "runpy", "__main__"})
_MOST_FRAMES: Final = 50


class LeaseExpired(ReceiverError):
    """context.connection is committed with the delivery's success: return, or use begin_nested() for a savepoint."""


class WorkAborted(ReceiverError):
    """A statement on context.connection failed, and the handler caught the error and returned.

    `sqlstate` and `frames` (module:line:function) are the statement's.
    """

    def __init__(self, code: str | None, frames: tuple[str, ...]) -> None:
        super().__init__(
            "an SQL statement on context.connection failed and the handler caught the error, so "
            "PostgreSQL commits nothing of its transaction: run what may fail within "
            "context.connection.begin_nested(), or let the error through"
        )
        self.sqlstate = code
        self.frames = frames


class OutcomeConnection:
    """The connection on which each statement is a transaction of its own."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, pooled=False)
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """Raises SQLAlchemyError when it cannot be opened."""
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._connection

    def drop(self) -> None:
        """Give the connection up: after an error nobody knows how it stands."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


class PluginConnection:
    """The connection of a plugin, in one transaction a run: begun when it is first asked for, ended by us alone."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, pooled=False)
        self._connection: Connection | None = None
        self._ours = False
        self.used = False
        self.patience = _LONGEST  # seconds that the run may take
        self._told: float | None = None  # the server
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "commit", self._committing)
        event.listen(self._engine, "handle_error", self._note_error)
        self._failed: WorkAborted | None = None  # the statement that failed last

    def connection(self) -> Connection:
        """The connection of this run. Raises SQLAlchemyError when it cannot be opened."""
        if self._connection is None or self._connection.closed:
            self._connection, self._told = self._engine.connect(), None
        self.used = True
        if not self._connection.in_transaction():
            if self._told != self.patience:
                self._tell(self._connection)
            # Begun, so that an ORM session that is bound to it joins in and leaves the commit to us.
            self._connection.begin()
        return self._connection

    def _tell(self, connection: Connection) -> None:
        """Have the server know how long it may hear nothing within a transaction."""
        self._ours = True
        try:
            with connection.begin():
                connection.exec_driver_sql(_IDLE, (str(int(self.patience * 1000)),))
        finally:
            self._ours = False
        self._told = self.patience

    def check(self) -> None:
        """Raise WorkAborted, naming the statement's place, where a statement failed and the handler went on."""
        if self.used and self._connection is not None and not self._connection.closed:
            driver: Any = self._connection.connection.driver_connection
            if driver.info.transaction_status is TransactionStatus.INERROR:
                raise self._failed or WorkAborted(None, ())

    def _note_error(self, context: ExceptionContext) -> None:
        """Remember where the statement stood: once the handler has caught the error, nothing else tells."""
        frames = [
            f"{module}:{line}:{frame.f_code.co_name}"
            for frame, line in traceback.walk_stack(None)
            if (module := str(frame.f_globals.get("__name__", "?"))).partition(".")[0] not in _LIBRARIES
            and not module.startswith(("receiver.handlers.", "receiver.storage."))
        ]
        self._failed = WorkAborted(sqlstate(context.original_exception), tuple(reversed(frames))[-_MOST_FRAMES:])

    def commit(self) -> None:
        """Commit the run's work, and what was recorded on the same connection. Raises SQLAlchemyError."""
        assert self._connection is not None
        self._ours = True
        try:
            self._connection.commit()
        finally:
            self._ours, self.used = False, False

    def rollback(self) -> None:
        """Undo the run's work; a connection that cannot is given up."""
        self.used = False
        if self._connection is None or self._connection.closed:
            return
        try:
            self._connection.rollback()
            # Of a transaction that a plugin has tried to end SQLAlchemy knows no more; the server does.
            self._connection.connection.rollback()
        except (SQLAlchemyError, PsycopgError):
            self.drop()

    def drop(self) -> None:
        """Give the connection up."""
        connection, self._connection = self._connection, None
        self.used = False
        if connection is not None and not connection.closed:
            connection.invalidate()
            connection.close()

    def _committing(self, _connection: Connection) -> None:
        if not self._ours:
            raise LeaseExpired


def lost(exc: SQLAlchemyError) -> bool:
    """Whether the connection is gone, and with it the knowledge of what was committed last."""
    return isinstance(exc, DBAPIError) and exc.connection_invalidated


def _prepare(driver: Any, _record: object) -> None:
    try:
        driver.execute(_SESSION)
        driver.commit()
    except PsycopgError:
        driver.rollback()
