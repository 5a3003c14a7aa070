"""Takes a body in as it arrives: whole, once, and no more of it than it may.

May not know a framework or a server: bytes come as `Read` steps are taken, and every way in which they can fail to is a
BadTransfer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Final

from receiver.errors import BadTransfer, Unavailable
from receiver.web.steps import Read, Steps

# A body is asked for in pieces of this size: small against a body of 40 MB, large against a system call.
PIECE: Final = 1024 * 1024
# What every request may have without asking: most messages are smaller, so that no number of large ones stops a feed.
# A thousand connections, each with so much, are the price.
SMALL: Final = 64 * 1024
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


def framing(announced: str, *, coded: bool) -> tuple[int | None, bool]:
    """(length, whether its end can be known) of a body, by what the head says. Length None: it comes in chunks.

    `announced`: Content-Length, empty where there is none; `coded`: there is a Transfer-Encoding. Servers refuse
    themselves what is neither a length nor chunks; should one not, nothing of it may be read.
    """
    if not announced:
        return (None if coded else 0), True
    if not _DIGITS.fullmatch(announced):
        return None, False
    return int(announced), True


class Room:
    """How many bytes of bodies may be in memory at once in this process. Safe in threads.

    The first SMALL of each body are not counted. Those that nothing vouches for yet take at most half of it: whoever
    sends them may be anybody.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._left_unproved = size // 2
        self._lock = threading.Lock()

    @contextmanager
    def share(self, *, proved: bool) -> Iterator[Share]:
        """A share for one request; given back at the end of the block. `proved`: its head says for good whose it is."""
        share = Share(self, proved=proved)
        try:
            yield share
        finally:
            share.prove()
            self.take(-share.held, proved=True)

    def take(self, size: int, *, proved: bool) -> bool:
        """Take bytes from what is left; False when so many are not. Less than none gives them back."""
        with self._lock:
            if size > (self._left if proved else min(self._left, self._left_unproved)):
                return False
            self._left -= size
            if not proved:
                self._left_unproved -= size
            return True

    def prove(self, size: int) -> None:
        """So many bytes that were taken unproved are so no more."""
        with self._lock:
            self._left_unproved += size


class Share:
    """What one request holds of the room. `held`: bytes beyond the first SMALL, which are everybody's."""

    def __init__(self, room: Room, *, proved: bool) -> None:
        self._room = room
        self._proved = proved
        self._size = 0
        self.held = 0

    def grow(self, size: int) -> None:
        """Hold as many bytes more. Raises Unavailable when the room has not got them."""
        self._size += size
        wanted = max(0, self._size - SMALL) - self.held
        if wanted and not self._room.take(wanted, proved=self._proved):
            raise Unavailable("bodies_fill_memory")
        self.held += wanted

    def prove(self) -> None:
        """The body is proved: from now on it takes nothing from what strangers may have."""
        if not self._proved:
            self._proved = True
            self._room.prove(self.held)


def receive(announced: int | None, *, limit: int, share: Share | None = None) -> Steps[bytes | None]:
    """The whole body; None when it is larger than `limit`, without reading where its length is announced.

    `announced` None: it comes in chunks. Without a `share` no more than SMALL may be asked for.

    Raises BadTransfer: `body_incomplete` when it ended early, which servers do not say; and what reading raises. Raises
    Unavailable when too many bodies are in memory.
    """
    if announced is not None and announced > limit:
        return None
    # One buffer that grows where it is: to join 40 MB of pieces took as much again, in pieces that stay behind.
    body = BytesIO()
    size = 0
    # One byte beyond the limit tells a body in chunks that is too large from one that just fits.
    while wanted := (limit + 1 if announced is None else announced) - size:
        piece: bytes = yield Read(min(wanted, PIECE))
        if not piece:
            break
        size += len(piece)
        if size > limit:
            return None
        if share is not None:
            share.grow(len(piece))
        body.write(piece)
    if announced is not None and size < announced:
        raise BadTransfer("body_incomplete")
    return body.getvalue()
