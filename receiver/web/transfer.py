"""Takes a body in as it arrives: whole, once, and no more of it than it may.

May not know a framework or a server: bytes come from a `Transfer`, and every way in which they can fail to is a
BadTransfer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from receiver.errors import BadTransfer, Unavailable

# A body is asked for in pieces of this size: small against a body of 40 MB, large against a system call.
PIECE: Final = 1024 * 1024


class Transfer(Protocol):
    """The body of a request that is on its way.

    `length`: what Content-Length announces; None where the body comes in chunks. A request without a body has length 0.
    `read` returns at most `size` bytes, and none at the end, or when the sender has gone; it raises BadTransfer where
    the chunks are none.
    """

    @property
    def length(self) -> int | None: ...
    def read(self, size: int) -> bytes: ...


class Room:
    """How many bytes of bodies may be in memory at once in this process. Safe in threads."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A share for one request; given back at the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            with self._lock:
                self._left += share.held

    def take(self, size: int) -> bool:
        """Take bytes from what is left; False when so many are not."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True


class Share:
    """What one request holds of the room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.held = 0

    def grow(self, size: int) -> None:
        """Hold as many bytes more. Raises Unavailable when the room has not got them."""
        if not self._room.take(size):
            raise Unavailable("bodies_fill_memory")
        self.held += size


def receive(transfer: Transfer, *, limit: int, share: Share) -> bytes | None:
    """The whole body; None when it is larger than `limit`, without reading where its length is announced.

    Raises BadTransfer: `body_incomplete` when it ended early, which a WSGI server does not say; and what the transfer
    raises. Raises Unavailable when too many bodies are in memory.
    """
    announced = transfer.length
    if announced is not None and announced > limit:
        return None
    pieces: list[bytes] = []
    size = 0
    # One byte beyond the limit tells a body in chunks that is too large from one that just fits.
    while wanted := (limit + 1 if announced is None else announced) - size:
        piece = transfer.read(min(wanted, PIECE))
        if not piece:
            break
        size += len(piece)
        if size > limit:
            return None
        share.grow(len(piece))
        pieces.append(piece)
    if announced is not None and size < announced:
        raise BadTransfer("body_incomplete")
    return b"".join(pieces)
