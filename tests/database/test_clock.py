"""The database's clock decides, on a host whose own clock is wrong. The database is real; the host's clock is set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from sqlalchemy import Engine, text

from receiver.database import clock
from receiver.database.clock import Clock

TEN_MINUTES = timedelta(minutes=10)


@pytest.mark.parametrize("wrong", [TEN_MINUTES, -TEN_MINUTES], ids=["ahead", "behind"])
def test_a_host_whose_clock_is_wrong(engine: Engine, wrong: timedelta) -> None:
    """After the first answer of the database its time counts; before that, the host's."""
    known = Clock()
    with engine.connect() as connection, time_machine.travel(datetime.now(UTC) + wrong):
        before = known.now()
        known.compare(connection)
        theirs = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        assert abs(before - theirs) > TEN_MINUTES / 2
        assert abs(known.now() - theirs) < timedelta(minutes=1)
        ahead = clock.clock_skew(connection)
    assert ahead is not None
    assert clock.skew_message(ahead).endswith("ahead of" if wrong > timedelta(0) else "behind")


@pytest.mark.parametrize("sign", [1, -1], ids=["ahead", "behind"])
def test_a_clock_that_is_too_far_away_is_not_believed(
    engine: Engine, capsys: pytest.CaptureFixture[str], sign: int
) -> None:
    """Beyond a bound this host uses its own clock, and logs that once.

    Otherwise the database's clock could make expired credentials valid again.
    """
    known = Clock()
    with (
        engine.connect() as connection,
        time_machine.travel(datetime.now(UTC) + sign * (clock.MAX_BELIEVED_SKEW + timedelta(minutes=1))),
    ):
        known.compare(connection)
        known.compare(connection)
        assert abs(known.now() - datetime.now(UTC)) < timedelta(minutes=1)
    assert capsys.readouterr().out.count("clock.not_believed") == 1


def test_a_function_of_that_name_elsewhere_is_not_asked(engine: Engine) -> None:
    """A role that can create functions, and has a search path, cannot replace the function that returns the time."""
    with engine.connect() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE sql "
                "AS $$ SELECT timestamptz '2001-01-01' $$"
            )
        )
        connection.execute(text("SET LOCAL search_path = public, pg_catalog"))
        assert connection.execute(text("SELECT clock_timestamp()")).scalar_one().year == 2001
        ahead = clock.clock_skew(connection)
    assert ahead is not None
    assert abs(ahead) < timedelta(minutes=1)


def test_a_clock_that_is_set_right(engine: Engine) -> None:
    """The difference is forgotten as soon as both clocks agree again."""
    known = Clock()
    with engine.connect() as connection:
        with time_machine.travel(datetime.now(UTC) + TEN_MINUTES):
            known.compare(connection)
        known.compare(connection)
    before = datetime.now(UTC)
    assert before <= known.now() <= datetime.now(UTC)
