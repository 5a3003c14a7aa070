"""The rolling window of requests, and deadlines."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.outbound.errors import RateLimited
from receiver.outbound.limits import SlidingWindow, deadline, remaining


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=40))
def test_the_window_is_never_exceeded(most: int, gaps: list[float]) -> None:
    """Whenever requests come, any n + 1 of them are at least one window apart."""
    window = SlidingWindow(most, 10.0)
    now, places = 0.0, []
    for gap in gaps:
        now += gap
        places.append(now + window.reserve(now, most=1e9))

    assert places == sorted(places)
    assert all(late - early >= 10.0 - 1e-6 for early, late in zip(places, places[most:], strict=False))


def test_no_wait_while_the_window_is_free() -> None:
    """The first n requests do not wait, and neither does the next once the first has left the window."""
    window = SlidingWindow(2, 300.0)

    assert [window.reserve(now, most=0.0) for now in (0.0, 100.0, 300.0)] == [0.0, 0.0, 0.0]


def test_a_wait_beyond_the_deadline() -> None:
    """A request that would have to wait too long is refused with that time, and does not count in the window."""
    window = SlidingWindow(1, 300.0)
    window.reserve(0.0, most=0.0)

    with pytest.raises(RateLimited) as caught:
        window.reserve(100.0, most=199.0)
    assert caught.value.retry_after == 200.0
    assert caught.value.not_processed
    assert window.reserve(100.0, most=200.0) == 200.0


@pytest.mark.parametrize(("requests", "seconds"), [(0, 300.0), (1, 0.0)])
def test_an_impossible_window_is_refused(requests: int, seconds: float) -> None:
    """A window that allows no request is a configuration error."""
    with pytest.raises(ValueError, match="at least one request"):
        SlidingWindow(requests, seconds)


def test_wait() -> None:
    """`wait` returns no earlier than the time that it reserved."""
    window = SlidingWindow(1, 0.05)
    window.wait(1.0)
    began = time.monotonic()
    window.wait(1.0)
    window.wait(1.0)

    assert time.monotonic() - began >= 0.05


def test_the_nearer_deadline_holds() -> None:
    """A deadline within another can only be earlier. The outer deadline is restored afterwards."""
    with deadline(1000.0):
        with deadline(10.0):
            assert remaining() <= 10.0
        assert remaining() > 900.0
        with deadline(5000.0):
            assert 900.0 < remaining() <= 1000.0
    with deadline(-1.0):
        assert remaining() == 0.0
