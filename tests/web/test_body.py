"""Receiving bodies: limits for size, memory, time and pace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import BadTransfer, Unavailable
from receiver.protocol.tokens import MAX_REQUEST
from receiver.web.body import SMALL, START_TIMEOUT, BodyMemoryBudget, Reservation, discarded, framing, receive
from receiver.web.runtime import drive


class Pieces:
    """A transfer of these pieces. `asked`: the most bytes that were requested."""

    def __init__(self, length: int | None, pieces: Iterator[bytes] | list[bytes]) -> None:
        self.length = length
        self._rest = b"".join(pieces)
        self.asked = 0

    async def read(self, size: int, seconds: float) -> bytes:
        self.asked = max(self.asked, size)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def mark_authenticated(self) -> None:
        """There is no server."""


def taken(transfer: Pieces, limit: int, budget: int = 1000) -> bytes | None:
    with BodyMemoryBudget(budget).reservation(authenticated=True) as reservation:
        return received(transfer, limit, reservation)


def received(transfer: Pieces, limit: int, reservation: Reservation) -> bytes | None:
    return drive(receive(transfer, limit=limit, reservation=reservation))


@given(body=st.binary(max_size=50), limit=st.integers(0, 60), chunked=st.booleans())
def test_whole_or_nothing(body: bytes, limit: int, chunked: bool) -> None:
    """A body within the limit is received whole, a larger one not at all, with a length or chunked."""
    found = taken(Pieces(None if chunked else len(body), [body]), limit)
    assert found == (body if len(body) <= limit else None)


@given(body=st.binary(min_size=1, max_size=50), announced=st.integers(1, 60))
def test_announced_length(body: bytes, announced: int) -> None:
    """Exactly the announced length is read; a shorter body raises BadTransfer."""
    transfer = Pieces(announced, [body])
    if announced > len(body):
        with pytest.raises(BadTransfer, match="body_incomplete"):
            taken(transfer, 100)
    else:
        assert taken(transfer, 100) == body[:announced]
    assert transfer.asked <= announced


def test_announced_beyond_the_limit() -> None:
    """A body whose announced length is too large is not read."""
    transfer = Pieces(101, [101 * b"x"])
    assert taken(transfer, 100) is None
    assert transfer.asked == 0


def fill(reservation: Reservation, size: int) -> None:
    """Receive a body of that size."""
    assert received(Pieces(size, [size * b"x"]), size, reservation) == size * b"x"


def test_budget() -> None:
    """Bodies in memory share one budget, and return what they took."""
    budget = BodyMemoryBudget(100)
    with budget.reservation(authenticated=True) as first, budget.reservation(authenticated=True) as second:
        fill(first, SMALL + 60)
        with pytest.raises(Unavailable, match="bodies_fill_memory"):
            fill(second, SMALL + 60)
    with budget.reservation(authenticated=True) as reservation:
        fill(reservation, SMALL + 100)


def test_unauthenticated_bodies_take_half_of_the_budget() -> None:
    """Strangers get at most half of the budget, and nothing of what feeds hold."""
    budget = BodyMemoryBudget(100)
    with (
        budget.reservation(authenticated=False) as first,
        budget.reservation(authenticated=False) as second,
        budget.reservation(authenticated=True) as feed,
    ):
        fill(first, SMALL + 30)
        fill(second, SMALL + 20)
        with budget.reservation(authenticated=False) as third, pytest.raises(Unavailable):
            fill(third, SMALL + 1)
        fill(feed, SMALL + 50)
    with budget.reservation(authenticated=True) as feed, budget.reservation(authenticated=False) as stranger:
        fill(feed, SMALL + 90)
        with pytest.raises(Unavailable):
            fill(stranger, SMALL + 11)
    with budget.reservation(authenticated=False) as stranger:
        fill(stranger, SMALL + 50)


def test_an_authenticated_body_leaves_the_unauthenticated_half() -> None:
    """It still counts in the whole budget, once, and returns its part."""
    budget = BodyMemoryBudget(100)
    with budget.reservation(authenticated=False) as feed, budget.reservation(authenticated=False) as stranger:
        fill(feed, SMALL + 50)
        feed.mark_authenticated()
        feed.mark_authenticated()
        fill(stranger, SMALL + 50)
        with budget.reservation(authenticated=True) as late, pytest.raises(Unavailable):
            fill(late, SMALL + 1)
    with budget.reservation(authenticated=True) as reservation:
        fill(reservation, SMALL + 100)
    with budget.reservation(authenticated=False) as stranger, pytest.raises(Unavailable):
        fill(stranger, SMALL + 51)


def test_small_bodies_are_not_counted() -> None:
    """Small bodies, such as token requests, are received though the budget is used up."""
    assert MAX_REQUEST <= SMALL
    budget = BodyMemoryBudget(100)
    with (
        budget.reservation(authenticated=True) as large,
        budget.reservation(authenticated=True) as feed,
        budget.reservation(authenticated=False) as stranger,
    ):
        fill(large, SMALL + 100)
        fill(feed, SMALL)
        fill(stranger, SMALL)


class Slow(Pieces):
    """A sender of one byte at a time, each after this many seconds of a simulated clock."""

    def __init__(self, length: int | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(length, [1_000_000 * b"x"])
        self._seconds, self.now, self.limits = seconds, 0.0, [0.0]
        monkeypatch.setattr("receiver.web.body.time.monotonic", lambda: self.now)

    async def read(self, size: int, seconds: float) -> bytes:
        self.limits.append(seconds)
        self.now += self._seconds
        return await super().read(1, seconds)


@pytest.mark.parametrize("length", [1000, None])
def test_a_slow_body(length: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of a byte a second fails at the total deadline, and no read may take longer than what is left of it."""
    slow = Slow(length, 1.0, monkeypatch)
    with pytest.raises(BadTransfer, match="body_too_slow"):
        taken(slow, 1000)
    assert START_TIMEOUT <= slow.now <= START_TIMEOUT + 1
    assert slow.limits[1] == 10.0
    assert slow.limits[-1] < 1.1


def test_a_body_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body at the minimum pace may take as long as its size requires."""
    slow = Slow(400_000, 1 / 70_000, monkeypatch)
    assert taken(slow, 400_000, 1_000_000) == 400_000 * b"x"
    assert slow.now > 5


@pytest.mark.parametrize(
    ("announced", "coding", "length"),
    [("", "", 0), ("4", "", 4), ("0", "", 0), ("", "chunked", None), ("", " Chunked ", None), ("4", "chunked", 4)],
)
def test_framing(announced: str, coding: str, length: int | None) -> None:
    """A body has a length, or is chunked."""
    assert framing(announced, coding) == length
    assert discarded(length) is (length is not None)


@pytest.mark.parametrize(
    ("announced", "coding", "status"),
    [
        ("-4", "", 400),
        ("4, 4", "", 400),
        ("\xb2", "", 400),
        ("9" * 20, "", 400),
        ("", "gzip, chunked", 501),
        ("", "chunked, chunked", 501),
        ("4", "gzip", 501),
        ("", "xchunked", 501),
    ],
)
def test_bad_framing(announced: str, coding: str, status: int) -> None:
    """Any other framing is malformed; an unknown transfer coding is 501."""
    with pytest.raises(BadTransfer) as raised:
        framing(announced, coding)
    assert raised.value.status_hint == status
