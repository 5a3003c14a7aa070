"""Bodies as they arrive, cut into any pieces."""

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
    """A transfer that brings these pieces, and after them nothing. `asked`: how many bytes were asked for at most."""

    def __init__(self, length: int | None, pieces: Iterator[bytes] | list[bytes]) -> None:
        self.length = length
        self._rest = b"".join(pieces)
        self.asked = 0

    async def read(self, size: int, seconds: float) -> bytes:
        self.asked = max(self.asked, size)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def mark_authenticated(self) -> None:
        """No server is told."""


def taken(transfer: Pieces, limit: int, budget: int = 1000) -> bytes | None:
    with BodyMemoryBudget(budget).reservation(authenticated=True) as reservation:
        return received(transfer, limit, reservation)


def received(transfer: Pieces, limit: int, reservation: Reservation) -> bytes | None:
    return drive(receive(transfer, limit=limit, reservation=reservation))


@given(body=st.binary(max_size=50), limit=st.integers(0, 60), chunked=st.booleans())
def test_whole_or_nothing(body: bytes, limit: int, chunked: bool) -> None:
    """A body within the limit comes whole, a larger one not at all, however it is framed."""
    found = taken(Pieces(None if chunked else len(body), [body]), limit)
    assert found == (body if len(body) <= limit else None)


@given(body=st.binary(min_size=1, max_size=50), announced=st.integers(1, 60))
def test_announced_length(body: bytes, announced: int) -> None:
    """With an announced length exactly so much is read, and less is a broken transfer."""
    transfer = Pieces(announced, [body])
    if announced > len(body):
        with pytest.raises(BadTransfer, match="body_incomplete"):
            taken(transfer, 100)
    else:
        assert taken(transfer, 100) == body[:announced]
    assert transfer.asked <= announced


def test_announced_beyond_the_limit() -> None:
    """What is announced to be too large is not read at all."""
    transfer = Pieces(101, [101 * b"x"])
    assert taken(transfer, 100) is None
    assert transfer.asked == 0


def fill(reservation: Reservation, size: int) -> None:
    """Take a body of that size in."""
    assert received(Pieces(size, [size * b"x"]), size, reservation) == size * b"x"


def test_budget() -> None:
    """Bodies that are in memory at once share one budget, and give it back."""
    budget = BodyMemoryBudget(100)
    with budget.reservation(authenticated=True) as first, budget.reservation(authenticated=True) as second:
        fill(first, SMALL + 60)
        with pytest.raises(Unavailable, match="bodies_fill_memory"):
            fill(second, SMALL + 60)
    with budget.reservation(authenticated=True) as reservation:
        fill(reservation, SMALL + 100)


def test_what_nothing_vouches_for_takes_half_of_the_budget() -> None:
    """However many strangers send, the other half is the feeds'. Nor do strangers have what feeds have taken."""
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


def test_a_body_that_was_proved_leaves_the_half() -> None:
    """It still takes its place in the whole, once, and gives it back."""
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
    """Whatever fills it, and whoever sends them; a token request is one."""
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
    """A sender that brings a byte at a time, and takes as many seconds for each, by a clock of its own."""

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
    """A body that comes a byte a second ends with the time that all of it may take; no read may take longer."""
    slow = Slow(length, 1.0, monkeypatch)
    with pytest.raises(BadTransfer, match="body_too_slow"):
        taken(slow, 1000)
    assert START_TIMEOUT <= slow.now <= START_TIMEOUT + 1
    assert slow.limits[1] == 10.0
    assert slow.limits[-1] < 1.1


def test_a_body_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps the minimum pace may take as long as it is large."""
    slow = Slow(400_000, 1 / 70_000, monkeypatch)
    assert taken(slow, 400_000, 1_000_000) == 400_000 * b"x"
    assert slow.now > 5


@pytest.mark.parametrize(
    ("announced", "coding", "length"),
    [("", "", 0), ("4", "", 4), ("0", "", 0), ("", "chunked", None), ("", " Chunked ", None), ("4", "chunked", 4)],
)
def test_framing(announced: str, coding: str, length: int | None) -> None:
    """A length, or chunks."""
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
    """What is neither a length nor chunks is malformed; a coding that nobody here knows is 501."""
    with pytest.raises(BadTransfer) as raised:
        framing(announced, coding)
    assert raised.value.status_hint == status
