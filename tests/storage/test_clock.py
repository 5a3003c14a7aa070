"""The database's clock, on a host whose own is wrong: the real database, and a host's clock that is set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from sqlalchemy import Engine, text

from receiver.storage import clock
from receiver.storage.clock import Clock

TEN_MINUTES = timedelta(minutes=10)


@pytest.mark.parametrize("wrong", [TEN_MINUTES, -TEN_MINUTES], ids=["ahead", "behind"])
def test_a_host_whose_clock_is_wrong(engine: Engine, wrong: timedelta) -> None:
    """From when it has asked on, it judges by the database's time; before it has only its own."""
    known = Clock()
    with engine.connect() as connection, time_machine.travel(datetime.now(UTC) + wrong):
        before = known.now()
        known.compare(connection)
        theirs = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        assert abs(before - theirs) > TEN_MINUTES / 2
        assert abs(known.now() - theirs) < timedelta(minutes=1)
        ahead = clock.apart(connection)
    assert ahead is not None
    assert clock.told(ahead).endswith("ahead of" if wrong > timedelta(0) else "behind")


def test_a_clock_that_is_set_right(engine: Engine) -> None:
    """What was known of it is forgotten as soon as the two are together again."""
    known = Clock()
    with engine.connect() as connection:
        with time_machine.travel(datetime.now(UTC) + TEN_MINUTES):
            known.compare(connection)
        known.compare(connection)
    before = datetime.now(UTC)
    assert before <= known.now() <= datetime.now(UTC)
