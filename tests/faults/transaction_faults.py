"""Faults that make PostgreSQL end our transactions: serialization failures and deadlocks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import psycopg
from psycopg import sql

from tests.faults import outages
from tests.faults.site import Installation

_FUNCTION: Final = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.3 THEN
        RAISE EXCEPTION 'not now' USING ERRCODE = CASE WHEN random() < 0.5 THEN '40001' ELSE '40P01' END;
    END IF;
    RETURN NULL;
END $$"""
_TABLES: Final = ("messages", "message_keys", "deliveries", "delivery_attempts", "lanes", "audit_events")
# Pairs of tables that our transactions write in this order.
_PAIRS: Final = (("messages", "payloads"), ("deliveries", "delivery_attempts"))


def transactions_fail(site: Installation, dice: random.Random) -> None:
    """Serialization failures and deadlocks in three of ten statements that write."""
    with psycopg.connect(outages.address(site.cluster)) as connection:
        connection.execute(_FUNCTION)
        for table in _TABLES:
            connection.execute(
                sql.SQL(
                    "CREATE TRIGGER refuse AFTER INSERT OR UPDATE ON {} FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
                ).format(sql.Identifier(table))
            )
            connection.commit()  # lock one table at a time: this session must not take part in a deadlock
        time.sleep(dice.uniform(2.0, 4.0))
        for table in _TABLES:
            connection.execute(sql.SQL("DROP TRIGGER refuse ON {}").format(sql.Identifier(table)))
            connection.commit()
        connection.execute("DROP FUNCTION refuse()")


def deadlocks(site: Installation, dice: random.Random) -> None:
    """Deadlocks with a session that locks our tables in the opposite order; PostgreSQL ends our transactions."""
    ends = time.monotonic() + dice.uniform(4.0, 6.0)
    with psycopg.connect(outages.address(site.cluster)) as connection:
        # PostgreSQL ends the session that looks for the deadlock first. Ours look after one second.
        connection.execute("SET deadlock_timeout = '1min'")
        connection.execute("SET lock_timeout = '3s'")
        connection.commit()
        while time.monotonic() < ends:
            first, later = dice.choice(_PAIRS)
            with suppress(psycopg.errors.LockNotAvailable), connection.transaction():
                connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(later)))
                if _holds(lambda: _blocks_another(connection), ends):
                    connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(first)))
            time.sleep(0.1)


def _blocks_another(connection: psycopg.Connection) -> bool:
    return connection.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))"
    ).fetchone() == (True,)


def _holds(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
