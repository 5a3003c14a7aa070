"""Receives a request body: with limits for size, memory, time and pace.

Must not know a framework or a server: the bytes come from a `Transfer`, and every failure is a BadTransfer.
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

# Bytes of one read: few compared with a body of 40 MB, many compared with the cost of a system call.
PIECE: Final = 1024 * 1024
# Bytes that every request may hold without a reservation. Most messages are smaller, so large ones cannot stop a feed.
# The cost: a thousand connections can hold this much each.
SMALL: Final = 64 * 1024
# Seconds of silence after which a sender is considered gone. Proxies use 10 to 60.
SILENCE_TIMEOUT: Final = 10.0
# A body may take START_TIMEOUT seconds, and one second more for each PACE bytes: the minimum pace.
START_TIMEOUT: Final = 15.0
PACE: Final = 64 * 1024
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


class Transfer(Protocol):
    """The body of a request that is arriving.

    `length`: the value of Content-Length; None if the body is chunked; 0 if there is no body. It raises what `framing`
    raises.
    """

    @property
    def length(self) -> int | None: ...

    async def read(self, size: int, seconds: float) -> bytes:
        """Read at most `size` bytes; returns b"" at the end, or when the sender has gone.

        Raises BadTransfer: `body_malformed`, or `body_too_slow` after this many seconds without data, if the server can
        detect that.
        """

    def mark_authenticated(self) -> None:
        """The head authenticates the request: the server keeps its connection longer than a stranger's."""


def framing(announced: str, coding: str) -> int | None:
    """The length of a body according to its head; None if it is chunked.

    `announced`: Content-Length, `coding`: Transfer-Encoding; empty if absent. Servers refuse other framing themselves.
    If one does not, the body is not read: raises BadTransfer `body_malformed`, or `transfer_coding_unknown` (RFC 9112
    section 6.1: 501).
    """
    if coding and coding.strip(" \t").lower() != "chunked":
        raise BadTransfer("transfer_coding_unknown", status_hint=501)
    if not announced:
        return None if coding else 0
    if not _DIGITS.fullmatch(announced):
        raise BadTransfer("body_malformed")
    return int(announced)


def discarded(length: int | None) -> bool:
    """Whether a server may read and discard an unread body of this length, to keep the connection."""
    return length is not None and length <= SMALL


class BodyMemoryBudget:
    """The limit for bytes of bodies in memory in this process. Safe in threads.

    The first SMALL bytes of each body are not counted. Bodies that are not authenticated yet get at most half of the
    budget, because anyone can send them.
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
        """Take bytes from the budget; returns False if fewer are left. A negative size returns them."""
        with self._lock:
            if size > (self._left if authenticated else min(self._left, self._left_unauthenticated)):
                return False
            self._left -= size
            if not authenticated:
                self._left_unauthenticated -= size
            return True

    def mark_authenticated(self, size: int) -> None:
        """Bytes that were taken as unauthenticated are authenticated now."""
        with self._lock:
            self._left_unauthenticated += size


class Reservation:
    """The part of the budget that one request holds. `held`: bytes beyond the first SMALL, which are not counted."""

    def __init__(self, budget: BodyMemoryBudget, *, authenticated: bool) -> None:
        self._budget = budget
        self._authenticated = authenticated
        self._size = 0
        self.held = 0

    def grow(self, size: int) -> None:
        """Hold this many bytes more. Raises Unavailable if the budget does not have them."""
        self._size += size
        wanted = max(0, self._size - SMALL) - self.held
        if wanted and not self._budget.take(wanted, authenticated=self._authenticated):
            raise Unavailable("bodies_fill_memory")
        self.held += wanted

    def mark_authenticated(self) -> None:
        """The body is authenticated: it no longer counts against the unauthenticated half."""
        if not self._authenticated:
            self._authenticated = True
            if self.held:
                self._budget.mark_authenticated(self.held)


async def receive(transfer: Transfer, *, limit: int, reservation: Reservation | None = None) -> bytes | None:
    """Receive the whole body. Returns None if it is larger than `limit`; if its length is announced, nothing is read.

    Without a `reservation`, `limit` must not exceed SMALL. Time between two reads does not count against the sender.

    Raises BadTransfer: `body_incomplete` if it ended early, which servers do not report; `body_too_slow`; and what
    reading raises. Raises Unavailable if too many bodies are in memory.
    """
    announced = transfer.length
    if announced is not None and announced > limit:
        return None
    # One growing buffer: joining the pieces of 40 MB would take the same amount again.
    body: BytesIO | None = None
    size = 0
    seconds = START_TIMEOUT
    # One byte beyond the limit distinguishes a chunked body that is too large from one that just fits.
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
