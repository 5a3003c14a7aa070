"""Receives a body as it arrives: whole, once, at a minimum pace, and no more of it than may be read.

Must not know a framework or a server: bytes come from a `Transfer`, and every way in which they can fail to come is a
BadTransfer.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Final, Protocol

from receiver.errors import BadTransfer, Unavailable

# A body is asked for in pieces of this size: small against a body of 40 MB, large against a system call.
PIECE: Final = 1024 * 1024
# What every request may have without a reservation: most messages are smaller, so that no number of large ones stops a
# feed. A thousand connections, each with so much, are the price.
SMALL: Final = 64 * 1024
# A sender that is silent for so many seconds is gone. Proxies have 10 to 60 seconds here.
SILENCE_TIMEOUT: Final = 10.0
# Seconds that a body may take in all, and for each so many bytes a second more: the minimum pace.
START_TIMEOUT: Final = 15.0
PACE: Final = 64 * 1024
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


class Transfer(Protocol):
    """The body of a request that is on its way.

    `length`: what Content-Length announces; None where the body comes in chunks. A request without a body has length 0.
    It raises what `framing` raises.
    """

    @property
    def length(self) -> int | None: ...

    async def read(self, size: int, seconds: float) -> bytes:
        """At most `size` bytes; none at the end, or when the sender has gone.

        Raises BadTransfer: `body_malformed`; and `body_too_slow` when nothing came for so many seconds, where the
        server can tell.
        """

    def mark_authenticated(self) -> None:
        """The head proves whose body this is: the server keeps its connection longer than a stranger's."""


def framing(announced: str, coding: str) -> int | None:
    """The length of a body, by what its head says; None: it comes in chunks.

    `announced`: Content-Length, and `coding`: Transfer-Encoding, empty where there is none. Servers refuse themselves
    what is neither a length nor chunks; should one not, it is not read: raises BadTransfer `body_malformed`, or
    `transfer_coding_unknown` (RFC 9112 section 6.1: 501).
    """
    if coding and coding.strip(" \t").lower() != "chunked":
        raise BadTransfer("transfer_coding_unknown", status_hint=501)
    if not announced:
        return None if coding else 0
    if not _DIGITS.fullmatch(announced):
        raise BadTransfer("body_malformed")
    return int(announced)


def discarded(length: int | None) -> bool:
    """Whether a server may read over a body that nobody has asked for, so that its connection can be kept."""
    return length is not None and length <= SMALL


class BodyMemoryBudget:
    """Bytes of bodies that may be in memory at once in this process. Safe in threads.

    The first SMALL of each body are not counted. Bodies that are not authenticated yet take at most half of it: anybody
    may send them.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._left_unauthenticated = size // 2
        self._lock = threading.Lock()

    @contextmanager
    def reservation(self, *, authenticated: bool) -> Iterator[Reservation]:
        """A reservation for one request, released at the end of the block."""
        reservation = Reservation(self, authenticated=authenticated)
        try:
            yield reservation
        finally:
            reservation.mark_authenticated()
            if reservation.held:
                self.take(-reservation.held, authenticated=True)

    def take(self, size: int, *, authenticated: bool) -> bool:
        """Take bytes from what is left; False when so many are not. A negative size gives them back."""
        with self._lock:
            if size > (self._left if authenticated else min(self._left, self._left_unauthenticated)):
                return False
            self._left -= size
            if not authenticated:
                self._left_unauthenticated -= size
            return True

    def mark_authenticated(self, size: int) -> None:
        """So many bytes that were taken unauthenticated are authenticated now."""
        with self._lock:
            self._left_unauthenticated += size


class Reservation:
    """What one request holds of the budget. `held`: bytes beyond the first SMALL, which are not counted."""

    def __init__(self, budget: BodyMemoryBudget, *, authenticated: bool) -> None:
        self._budget = budget
        self._authenticated = authenticated
        self._size = 0
        self.held = 0

    def grow(self, size: int) -> None:
        """Hold as many bytes more. Raises Unavailable when the budget has not got them."""
        self._size += size
        wanted = max(0, self._size - SMALL) - self.held
        if wanted and not self._budget.take(wanted, authenticated=self._authenticated):
            raise Unavailable("bodies_fill_memory")
        self.held += wanted

    def mark_authenticated(self) -> None:
        """The body is proved: from now on it takes nothing from the strangers' half."""
        if not self._authenticated:
            self._authenticated = True
            if self.held:
                self._budget.mark_authenticated(self.held)


async def receive(transfer: Transfer, *, limit: int, reservation: Reservation | None = None) -> bytes | None:
    """The whole body; None when it is larger than `limit`, without reading where its length is announced.

    Without a `reservation` no more than SMALL may be asked for. Our own time between two reads does not count against
    the sender.

    Raises BadTransfer: `body_incomplete` when it ended early, which servers do not say; `body_too_slow`; and what
    reading raises. Raises Unavailable when too many bodies are in memory.
    """
    announced = transfer.length
    if announced is not None and announced > limit:
        return None
    # One buffer that grows where it is: to join 40 MB of pieces took as much again, in pieces that stay behind.
    body: BytesIO | None = None
    size = 0
    seconds = START_TIMEOUT
    # One byte beyond the limit tells a body in chunks that is too large from one that just fits.
    while wanted := (limit + 1 if announced is None else announced) - size:
        if seconds <= 0:
            raise BadTransfer("body_too_slow")
        asked = time.monotonic()
        piece = await transfer.read(min(wanted, PIECE), min(SILENCE_TIMEOUT, seconds))
        seconds += len(piece) / PACE - (time.monotonic() - asked)
        if not piece:
            break
        size += len(piece)
        if size > limit:
            return None
        if reservation is not None:
            reservation.grow(len(piece))
        if size == announced and body is None:
            return piece
        if body is None:
            body = BytesIO()
        body.write(piece)
    if announced is not None and size < announced:
        raise BadTransfer("body_incomplete")
    return b"" if body is None else body.getvalue()
