"""What may be used once, for every host."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine

from receiver.database.engine import open_engine
from receiver.errors import Unavailable
from receiver.protocol.message import Nonce
from receiver.storage.accept.replay_guard import ReplayGuard, forget

LATER = datetime.now(UTC) + timedelta(hours=1)


def once(value: str, until: datetime = LATER) -> Nonce:
    return Nonce.of("test", value.encode(), until)


def test_the_first_and_nobody_else(engine: Engine, database_url: str) -> None:
    """The first is told so; all later ones, here and on another host, that they are not."""
    other = open_engine(database_url)
    assert ReplayGuard(engine).first([once("a")])
    assert not ReplayGuard(engine).first([once("a")])
    assert not ReplayGuard(other).first([once("a")])
    assert ReplayGuard(other).first([once("b")])
    other.dispose()


def test_of_several_each_must_be_new(engine: Engine) -> None:
    """Where two signatures vouch for one request, one that was seen is enough."""
    assert ReplayGuard(engine).first([once("a"), once("b")])
    assert not ReplayGuard(engine).first([once("b"), once("c")])


def test_at_the_same_moment_one_is_first(database_url: str) -> None:
    """Of many who come at once, exactly one is the first."""
    engine = open_engine(database_url, pool_size=8)
    seen = ReplayGuard(engine)
    with ThreadPoolExecutor(8) as pool:
        answers = [list(pool.map(lambda n: seen.first([once(f"round {n // 8}")]), range(64)))]
    assert sum(map(sum, answers)) == 8
    engine.dispose()


def test_it_is_forgotten_when_it_is_over(engine: Engine) -> None:
    """Only what is good for nothing by itself any more, on a host whose clock is a day behind too."""
    over = datetime.now(UTC) - timedelta(days=1, seconds=1)
    late = datetime.now(UTC) - timedelta(hours=1)
    ReplayGuard(engine).first([once("old", over), once("older", over), once("late", late), once("new")])
    with engine.begin() as connection:
        assert forget(connection) == 2
        assert forget(connection) == 0
    assert not ReplayGuard(engine).first([once("new")])
    assert not ReplayGuard(engine).first([once("late")])
    assert ReplayGuard(engine).first([once("old")])


def test_a_database_that_is_away(engine: Engine) -> None:
    """Then nobody knows, and nobody is told that he is the first."""
    away = open_engine("postgresql://nobody@127.0.0.1:9/nothing")
    with pytest.raises(Unavailable, match="database_away"):
        ReplayGuard(away).first([once("a")])
