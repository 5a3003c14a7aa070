"""A connection under gunicorn's threaded worker: what is read of it has deadlines, and it is closed once.

May not judge a request, nor answer one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from gunicorn.http import errors  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.http.message import Request  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.http.unreader import SocketUnreader  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.workers.gthread import TConn  # type: ignore[import-untyped]  # gunicorn ships no types

# A client that is silent for so long is gone. Proxies have 10 to 60 seconds here; behind one, these never count.
SILENCE: Final = 10.0
# While we wait for a request it must come at this pace, after a start that covers a slow line's handshakes.
START: Final = 15.0
PACE: Final = 64 * 1024
# What is at once told apart from a request line, such as a TLS handshake: its client would only wait.
FIRST: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\r")


class Unreader(SocketUnreader):  # type: ignore[misc]  # gunicorn ships no types
    """Reads from a connection, within its deadlines. Raises NoMoreData beyond them: the client is as good as gone."""

    _fresh = True
    # Whether what is there is all that may be read: nobody here may wait.
    whole = False

    def begin(self) -> None:
        """A request may begin now."""
        self._left = START

    def take(self, data: bytes) -> None:
        """What somebody else has read, in front of what comes. Raises InvalidRequestLine."""
        self._check(data)
        self._left += len(data) / PACE
        self.unread(data)

    def chunk(self, size_hint: int | None = None) -> bytes:
        if self._left <= 0 or self.whole:
            raise errors.NoMoreData
        self.sock.settimeout(min(SILENCE, self._left))
        asked = time.monotonic()
        try:
            data: bytes = super().chunk(size_hint)
        except TimeoutError as exc:
            raise errors.NoMoreData from exc
        self._check(data)
        # What we take for ourselves between two pieces is not held against the client.
        self._left += len(data) / PACE - (time.monotonic() - asked)
        return data

    def _check(self, data: bytes) -> None:
        if self._fresh and data and data[0] not in FIRST:
            raise errors.InvalidRequestLine("")
        self._fresh = False


class _Request(Request):  # type: ignore[misc]  # gunicorn ships no types
    """A request of whose head nothing is believed that the peer says of itself, whoever it is: receiver.web.peers does.

    gunicorn reads the peer's address anew for each request, to find that out.
    """

    def _peer_is_trusted_proxy(self) -> bool:
        return False


class Connection(TConn):  # type: ignore[misc]  # gunicorn ships no types
    """A connection that is closed once, by whoever comes first."""

    closed = False
    kept = False  # it is, or will be when it comes back, among those that wait for their next request
    busy = False  # a request of it is at work in the main loop
    polled = True  # the poller tells of it

    def init(self) -> None:
        """Make the parser, once; it reads through `Unreader`."""
        super().init()
        if not isinstance(self.parser.unreader, Unreader):
            self.parser.unreader = Unreader(self.sock)
            self.parser.mesg_class = _Request
        self.parser.unreader.begin()

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully in a thread that may wait for the client to take the answer."""
        if not self.closed:
            self.closed = True
            super().close(graceful)


class Body:
    """The body, read without a place among the requests at work: its sender may take its time."""

    def __init__(self, body: Any, places: threading.Semaphore, begin: Callable[[], object]) -> None:
        self._body, self._places, self._begin = body, places, begin

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; all that comes where it is negative (PEP 3333)."""
        self._places.release()
        try:
            self._begin()
            data: bytes = self._body.read(size)
        finally:
            self._places.acquire()
        return data


class Continue:
    """Sends "100 Continue" when the body is first asked for: a refused request's never is (RFC 9110 section 10.1.1)."""

    def __init__(self, connection: socket.socket, *, expected: bool) -> None:
        self._connection, self._expected = connection, expected

    def __call__(self) -> None:
        if self._expected:
            self._expected = False
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
