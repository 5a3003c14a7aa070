"""Bodies as they arrive, cut into any pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import BadTransfer, Unavailable
from receiver.web.transfer import Room, receive


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
    with Room(room).share() as share:
        return receive(transfer, limit=limit, share=share)


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


def test_room() -> None:
    """Bodies that are in memory at once share one room, and give it back."""
    room = Room(100)
    with room.share() as first, room.share() as second:
        assert receive(Pieces(60, [60 * b"x"]), limit=100, share=first) == 60 * b"x"
        with pytest.raises(Unavailable, match="bodies_fill_memory"):
            receive(Pieces(60, [60 * b"x"]), limit=100, share=second)
    with room.share() as share:
        assert receive(Pieces(None, [100 * b"x"]), limit=100, share=share) == 100 * b"x"
