"""The engine: database URLs as people write them, and errors that never quote a row."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, insert, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from receiver.database.engine import connect_arguments, dedicated, describe, normalise, open_engine, sqlstate
from receiver.errors import ConfigurationError
from receiver.storage import schema

CANARY = "Ada Lovelace, MRN 4711"


@pytest.mark.parametrize("url", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"])
def test_a_url_is_taken_as_people_write_it(url: str) -> None:
    """All three spellings mean psycopg. The rest of the URL stays as it is."""
    assert normalise(url).render_as_string(hide_password=False) == "postgresql+psycopg://u:p@h/d"


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://u:canary@h/d", "sqlite:///x", "postgresql+asyncpg://u:canary@h/d"]
)
def test_any_other_is_told_which_setting_is_wrong(url: str) -> None:
    """Another driver's URL is refused. The error names the setting, and not the password."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        normalise(url)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_a_password_is_in_no_repr() -> None:
    """The repr of an engine hides the password."""
    assert "canary" not in repr(open_engine("postgresql://u:canary@h/d"))


# --- errors


def _unique(connection: Connection) -> None:
    row = {"one": False, "version": 1}
    connection.execute(text("CREATE TEMP TABLE people (name text UNIQUE)"))
    connection.execute(text("INSERT INTO people VALUES (:name)"), {"name": CANARY})
    connection.execute(text("INSERT INTO people VALUES (:name)"), {"name": CANARY} | row)


def _check(connection: Connection) -> None:
    connection.execute(text("CREATE TEMP TABLE people (name text CHECK (length(name) < 3), other text)"))
    connection.execute(text("INSERT INTO people VALUES (:name, :name)"), {"name": CANARY})


def _not_null(connection: Connection) -> None:
    connection.execute(text("CREATE TEMP TABLE people (name text, other text NOT NULL)"))
    connection.execute(text("INSERT INTO people VALUES (:name, NULL)"), {"name": CANARY})


def _cast(connection: Connection) -> None:
    connection.execute(text("SELECT CAST(CAST(:name AS text) AS integer)"), {"name": CANARY})


def _cast_on_the_way(connection: Connection) -> None:
    connection.execute(
        select(schema.messages.c.id).where(schema.messages.c.id == text("CAST(:name AS bigint)")), {"name": CANARY}
    )


def _nul(connection: Connection) -> None:
    connection.execute(text("SELECT CAST(:name AS text)"), {"name": f"{CANARY}\0"})


def _surrogate(connection: Connection) -> None:
    connection.execute(text("SELECT CAST(:name AS text)"), {"name": f"{CANARY}\ud800"})


def _many(connection: Connection) -> None:
    connection.execute(insert(schema.keys), [{"id": CANARY, "purpose": "p", "fingerprint": "f"}] * 2)


def _raised(connection: Connection) -> None:
    connection.execute(
        text(f"DO $$ BEGIN RAISE EXCEPTION 'no {CANARY}' USING DETAIL = '{CANARY}', HINT = '{CANARY}'; END $$")
    )


def _in_a_function(connection: Connection) -> None:
    connection.execute(
        text("CREATE FUNCTION pg_temp.f(name text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN name::int; END $$")
    )
    connection.execute(text("SELECT pg_temp.f(:name)"), {"name": CANARY})


def _streamed(connection: Connection) -> None:
    rows = connection.execution_options(yield_per=1).execute(
        text(
            "SELECT CASE WHEN n < 3 THEN n ELSE CAST(CAST(:name AS text) AS integer) END FROM generate_series(1, 5) n"
        ),
        {"name": CANARY},
    )
    list(rows)


FAULTS = [_unique, _check, _not_null, _cast, _cast_on_the_way, _nul, _surrogate, _many, _in_a_function, _streamed]


def message(exc: BaseException) -> str:
    """Return everything that a log or a traceback shows of an exception and its causes."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [exc]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.append(one)
            waiting += [one.__cause__, one.__context__, getattr(one, "orig", None)]
    parts = ["".join(traceback.format_exception(exc))]
    for one in seen:
        parts += [str(one), repr(one.args), describe(one), repr(getattr(one, "params", None))]
        # The repr of a Unicode error shows more than its arguments. Our code prints none.
        parts += [] if isinstance(one, UnicodeError) else [repr(one)]
    return "\n".join(parts)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("opened", [lambda engine: engine, lambda engine: dedicated(engine, timeout=5)])
def test_no_error_quotes_a_row(
    engine: Engine,
    fault: Callable[[Connection], None],
    opened: Callable[[Engine], Engine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PostgreSQL quotes values in several fields, and SQLAlchemy adds parameters: none of them is shown."""
    caplog.set_level(logging.DEBUG)
    with opened(engine).connect() as connection, pytest.raises((SQLAlchemyError, UnicodeError)) as caught:
        fault(connection)
    logging.getLogger("somebody").error("it failed", exc_info=caught.value)
    assert CANARY not in message(caught.value)
    assert CANARY not in caplog.text


def test_a_statement_with_the_value_in_it_is_ours_to_avoid(engine: Engine) -> None:
    """The server's text is hidden for every statement. The statement is shown, so our code puts no value into one."""
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        _raised(connection)
    assert str(caught.value).startswith("RaiseException P0001\n[SQL: DO ")


@pytest.mark.parametrize(
    ("statement", "printed"),
    [
        ("SELECT 1/0", "DivisionByZero 22012"),
        ("SELECT", None),
        ("SELEC", "SyntaxError 42601"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "AdminShutdown 57P01"),
    ],
)
def test_an_error_is_described_by_class_and_code(engine: Engine, statement: str, printed: str | None) -> None:
    """An error shows its class and SQLSTATE, which is enough to look it up."""
    with engine.connect() as connection:
        if printed is None:
            connection.exec_driver_sql(statement)
            return
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql(statement)
        assert describe(caught.value) == printed
        assert sqlstate(caught.value) == printed[-5:] == sqlstate(caught.value.orig or caught.value)
        connection.invalidate()


def test_an_error_of_ours_or_of_the_way_has_no_sqlstate() -> None:
    """Without a server there is no SQLSTATE: the reason of a failed connection is a code of ours."""
    with pytest.raises(DBAPIError) as caught:
        open_engine("postgresql://127.0.0.1:1/canary", pooled=False).connect()
    assert describe(caught.value) == "OperationalError nothing_listens"
    assert "canary" not in str(caught.value)
    assert (sqlstate(ValueError()), describe(ValueError(CANARY))) == (None, "ValueError no SQLSTATE")


# --- sessions


def _shown(engine: Engine, name: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"SHOW {name}").scalar_one()


def test_a_session_keeps_utc_and_does_not_idle_in_a_transaction_for_ever(engine: Engine) -> None:
    """Times are returned in UTC, and a session that idles in a transaction is ended, so that it holds no locks."""
    assert _shown(engine, "timezone") == "UTC"
    assert _shown(engine, "idle_in_transaction_session_timeout") == "10min"
    assert _shown(engine, "statement_timeout") == "0"
    assert _shown(engine, "application_name") == "redox-receiver"


def test_a_statements_time_is_in_seconds(database_url: str) -> None:
    """The server cancels a statement after that many seconds."""
    engine = open_engine(database_url, pooled=False, statement_timeout=0.25)
    assert _shown(engine, "statement_timeout") == "250ms"
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.exec_driver_sql("SELECT pg_sleep(60)")
    assert sqlstate(caught.value) == "57014"


def test_a_dedicated_session_is_durable_and_impatient(engine: Engine) -> None:
    """synchronous_commit is on even where the server's default is off, as here: a 200 means that it is on disk."""
    assert _shown(engine, "synchronous_commit") == "off"
    ours = dedicated(engine, timeout=3.5)
    assert _shown(ours, "synchronous_commit") == "on"
    assert _shown(ours, "statement_timeout") == "3500ms"
    assert _shown(ours, "idle_in_transaction_session_timeout") == "3500ms"
    assert ours.url == engine.url


def test_a_dedicated_engine_keeps_no_connection_of_its_own(engine: Engine) -> None:
    """Each connection is new, and closed after use: none has to be tested before use."""
    ours = dedicated(engine, timeout=3.5)
    pids = []
    for _ in range(2):
        with ours.connect() as connection:
            pids.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
    assert pids[0] != pids[1]


def test_the_settings_of_a_connection_are_ones_that_libpq_knows() -> None:
    """libpq accepts all of them. An unknown one would fail every connection over TCP."""
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    assert set(connect_arguments(1.0)) <= known
