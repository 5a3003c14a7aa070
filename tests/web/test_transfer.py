"""Bodies as they arrive, cut into any pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import BadTransfer, Unavailable
from receiver.protocol.tokens import MAX_REQUEST
from receiver.web.steps import take
from receiver.web.transfer import SMALL, Room, Share, receive


class Pieces:
    """A transfer that brings these pieces, and after them nothing. `asked`: how many bytes were asked for at most."""

    def __init__(self, length: int | None, pieces: Iterator[bytes] | list[bytes]) -> None:
        self.length = length
        self._rest = b"".join(pieces)
        self.asked = 0

    def read(self, size: int) -> bytes:
        self.asked = max(self.asked, size)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def taken(transfer: Pieces, limit: int, room: int = 1000) -> bytes | None:
    with Room(room).share(proved=True) as share:
        return received(transfer, limit, share)


def received(transfer: Pieces, limit: int, share: Share) -> bytes | None:
    return take(receive(transfer.length, limit=limit, share=share), transfer)


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


def fill(share: Share, size: int) -> None:
    """Take a body of that size in."""
    assert received(Pieces(size, [size * b"x"]), size, share) == size * b"x"


def test_room() -> None:
    """Bodies that are in memory at once share one room, and give it back."""
    room = Room(100)
    with room.share(proved=True) as first, room.share(proved=True) as second:
        fill(first, SMALL + 60)
        with pytest.raises(Unavailable, match="bodies_fill_memory"):
            fill(second, SMALL + 60)
    with room.share(proved=True) as share:
        fill(share, SMALL + 100)


def test_what_nothing_vouches_for_takes_half_of_the_room() -> None:
    """However many strangers send, the other half is the feeds'. Nor do strangers have what feeds have taken."""
    room = Room(100)
    with room.share(proved=False) as first, room.share(proved=False) as second, room.share(proved=True) as feed:
        fill(first, SMALL + 30)
        fill(second, SMALL + 20)
        with room.share(proved=False) as third, pytest.raises(Unavailable):
            fill(third, SMALL + 1)
        fill(feed, SMALL + 50)
    with room.share(proved=True) as feed, room.share(proved=False) as stranger:
        fill(feed, SMALL + 90)
        with pytest.raises(Unavailable):
            fill(stranger, SMALL + 11)
    with room.share(proved=False) as stranger:
        fill(stranger, SMALL + 50)


def test_a_body_that_was_proved_leaves_the_half() -> None:
    """It still takes its place in the whole, once, and gives it back."""
    room = Room(100)
    with room.share(proved=False) as feed, room.share(proved=False) as stranger:
        fill(feed, SMALL + 50)
        feed.prove()
        feed.prove()
        fill(stranger, SMALL + 50)
        with room.share(proved=True) as late, pytest.raises(Unavailable):
            fill(late, SMALL + 1)
    with room.share(proved=True) as share:
        fill(share, SMALL + 100)
    with room.share(proved=False) as stranger, pytest.raises(Unavailable):
        fill(stranger, SMALL + 51)


def test_small_bodies_always_find_room() -> None:
    """Whatever fills it, and whoever sends them; a token request is one."""
    assert MAX_REQUEST <= SMALL
    room = Room(100)
    with room.share(proved=True) as large, room.share(proved=True) as feed, room.share(proved=False) as stranger:
        fill(large, SMALL + 100)
        fill(feed, SMALL)
        fill(stranger, SMALL)
