"""Statements that libpq prepares: what goes in arrives as it was, and what PostgreSQL refuses is told by its code."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import Engine

from receiver.storage.accept.prepared import PreparedStatements, Statement, array, encoder

UUID_7 = UUID("0195a1de-0000-7000-8000-00000000002a")


@pytest.fixture
def driver(engine: Engine) -> Iterator[psycopg.Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        yield driver
        connection.invalidate()


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("bigint", -(2**63), "-9223372036854775808"),
        ("integer", 2**31 - 1, "2147483647"),
        ("boolean", True, "t"),
        ("boolean", False, "f"),
        ("text", "é\u2028'\\", "é\u2028'\\"),
        ("text", "", ""),
        ("bytea", b"\0\xff", "\\x00ff"),
        ("uuid", UUID_7, str(UUID_7)),
        ("bigint[]", [3, -1], "{3,-1}"),
        ("bigint[]", [], "{}"),
        ("json", b'{"a":1}', '{"a":1}'),
        ("timestamptz", datetime(1, 1, 1, tzinfo=UTC), "0001-01-01 00:00:00+00"),
        ("timestamptz", datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC), "9999-12-31 23:59:59.999999+00"),
        *((kind, None, None) for kind in ("bigint", "boolean", "text", "bytea", "uuid", "timestamptz", "bigint[]")),
    ],
)
def test_a_value_arrives_as_it_was(driver: psycopg.Connection, kind: str, value: Any, shown: str | None) -> None:
    """Each type in binary; NULL is NULL."""
    statements = PreparedStatements(driver)
    ((found,),) = statements.run(Statement("shown", f"SELECT $1::{kind}"), encoder({"it": kind})({"it": value}))
    assert found == (None if shown is None else shown.encode())


def test_bodies_are_an_array(driver: psycopg.Connection) -> None:
    """In their order, whatever bytes they are."""
    bodies = [b"\0", b"", b'{},"' * 100]
    rows = PreparedStatements(driver).run(
        Statement("bodies", "SELECT unnest($1::bytea[])::text"), [array("bytea", bodies)]
    )
    assert [row[0] for row in rows] == [b"\\x" + body.hex().encode() for body in bodies]


def test_a_nul_in_a_text_is_refused_and_not_cut_off(driver: psycopg.Connection) -> None:
    """libpq would end a text parameter there, and keep another text than the one that was signed."""
    with pytest.raises(errors.CharacterNotInRepertoire) as caught:
        PreparedStatements(driver).run(Statement("text", "SELECT $1::text"), encoder({"it": "text"})({"it": "a\0b"}))
    assert caught.value.sqlstate == "22021"


@pytest.mark.parametrize("code", ["23505", "XX999"])
def test_an_error_has_its_code_and_no_text(driver: psycopg.Connection, code: str) -> None:
    """The server's message may quote a patient. A code that psycopg has no class for is told as well."""
    statements = PreparedStatements(driver)
    failing = "DO $$ BEGIN RAISE EXCEPTION 'of a patient' USING ERRCODE = '{}', DETAIL = 'of a patient'; END $$"
    with pytest.raises(psycopg.DatabaseError) as caught:
        statements.run(Statement(f"failing_{code}", failing.format(code)), [])
    assert caught.value.sqlstate == code
    assert "patient" not in repr(caught.value) + str(caught.value)
    assert not statements.lost
    assert statements.run(Statement("one", "SELECT 1"), []) == [(b"1",)]


def test_a_connection_that_is_lost_is_said_to_be(driver: psycopg.Connection, engine: Engine) -> None:
    """It has no code, or that of the server's farewell."""
    statements = PreparedStatements(driver)
    with engine.connect() as other:
        other.exec_driver_sql("SELECT pg_terminate_backend(%(pid)s)", {"pid": driver.info.backend_pid})
    with pytest.raises(psycopg.OperationalError):
        statements.run(Statement("one", "SELECT pg_sleep(10)"), [])
    assert statements.lost


def test_a_statement_is_prepared_once(driver: psycopg.Connection) -> None:
    """However often it runs."""
    statements, one = PreparedStatements(driver), Statement("one", "SELECT 1")
    assert [statements.run(one, []) for _ in range(3)] == [[(b"1",)]] * 3
    counted = Statement("counted", "SELECT count(*) FROM pg_prepared_statements WHERE name = 'one'")
    assert statements.run(counted, []) == [(b"1",)]
