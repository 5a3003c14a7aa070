"""The connection of a plugin's work: how long its server waits for a process that says nothing any more."""

from __future__ import annotations

from sqlalchemy import Engine, text

from receiver.storage.queue.connections import PluginConnection
from tests.support.waiting import until


def _lives(engine: Engine, pid: int) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}))


def test_work_that_stands_still_keeps_no_locks(engine: Engine, database_url: str) -> None:
    """A transaction that is idle for longer than its run may take is the server's to end; a run that is allowed more,
    on the same connection, was not ended before.
    """
    work = PluginConnection(database_url)
    work.timeout = 3600.0
    pid = work.connection().scalar(text("SELECT pg_backend_pid()"))
    assert work.connection().scalar(text("SHOW idle_in_transaction_session_timeout")) == "1h"
    work.commit()
    work.timeout = 0.2
    assert work.connection().scalar(text("SELECT pg_backend_pid()")) == pid
    until(lambda: not _lives(engine, pid), "the session ends")
    work.drop()
