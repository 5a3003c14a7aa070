"""The connection of a plugin's work: how long the server waits for an idle transaction."""

from __future__ import annotations

from sqlalchemy import Engine, text

from receiver.storage.queue.connections import PluginConnection
from tests.support.waiting import until


def _lives(engine: Engine, pid: int) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}))


def test_work_that_stands_still_keeps_no_locks(engine: Engine, database_url: str) -> None:
    """The server ends a transaction that is idle for longer than its run may take, and not one of a later run that may
    take longer.
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
