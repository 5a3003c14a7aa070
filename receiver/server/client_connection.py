"""One client's connection: what of a request has come, what was replied, and until when it may stay.

- What is not valid HTTP gets a reply with its status alone, after the replies to the requests before it.
- A connection that closes after a reply is read for a short time, until its client has received the reply.
- A connection whose client sends or reads too slowly is closed. receiver.server.connections chooses the one to close
  when there are too many.

Must not judge a request, and must not know uvicorn: receiver.server.protocol reports what happens.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Final

import structlog

from receiver.server.connections import ConnectionTable, Pool, network_of
from receiver.server.request_head import MAX_HEAD, RequestHead
from receiver.web.body import PACE, SILENCE_TIMEOUT, START_TIMEOUT

log: Final = structlog.get_logger(__name__)

# Requests of one connection that wait for their replies. A client that sends more reads none of them.
MAX_PIPELINED: Final = 64
# Seconds and bytes for which a connection is still read after its last reply. If it were closed at once, data that the
# client is still sending would make the kernel reset the connection and destroy the reply.
LINGER_TIMEOUT: Final = 2.0
MAX_LINGER: Final = 1024 * 1024
_CONTINUE: Final = b"HTTP/1.1 100 "


class ClientConnection:
    """The state of one connection: its requests, its replies and its deadlines. Times are monotonic."""

    def __init__(self, table: ConnectionTable) -> None:
        self.pool = Pool.WAITING
        self.dropped = False
        self.network = self.peer = ""
        self.head = RequestHead()
        self._table = table
        self._transport: asyncio.Transport
        self._since = self._heard = 0.0  # when it entered its pool; when its client last sent data
        self._received = 0  # bytes since `_since`
        self._parsing = self._failed = False
        self._in_body = self._began = self._progressed = False
        self._unfinished = 0  # bytes of a head, or between two pieces of a body
        self._at_work = 0  # requests without a reply
        self._authenticated = self._writing = False
        self._refusal: int | None = None
        self._refused = self._ended = self._closing = False
        self._stuck: tuple[int, float] = 0, 0.0  # bytes that the client does not read, and since when

    # --- events of the endpoint (receiver.web.asgi_request.ServerConnection)

    def mark_authenticated(self) -> None:
        """The head of the request is authenticated."""
        self._authenticated = True
        if self._in_body:
            self._settle()

    def replied(self, *, refused: bool) -> None:
        """A reply was handed to the transport."""
        self._at_work -= 1
        self._writing, self._refused = False, refused
        if self._refusal is not None:
            self._deliver()
        elif self._at_work == 0 and (self._ended or self.head.upgrade):
            self.close(linger=not self._ended)
        self._settle()

    # --- events of asyncio

    def made(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        """The connection is open. If all others have requests at work, it is closed at once."""
        self._transport = transport
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = str(peer[0])
            self.network = network_of(self.peer)
        self._since = self._heard = time.monotonic()
        if not self._table.add(self, loop):
            transport.abort()

    def lost(self) -> None:
        """The connection is closed."""
        self._closing = True
        self._table.remove(self)

    def before_parsing(self, data: bytes) -> bool:
        """Data has arrived. Return whether to parse it."""
        self._heard = time.monotonic()
        self._received += len(data)
        over = self.head.upgrade and not self.head.incomplete and not self._in_body
        if self._closing or self._refusal is not None or over:
            if self._received > MAX_LINGER:
                self._transport.abort()
            return False
        self._parsing, self._began, self._progressed = True, False, False
        return True

    def after_parsing(self, data: bytes) -> None:
        """uvicorn has parsed the data."""
        self._parsing = False
        if not self._failed and (self.head.incomplete or self._in_body) and not self._progressed:
            # If a request begins within the data, the bytes before belong to another.
            self._unfinished += 0 if self._began else len(data)
            if self._unfinished > MAX_HEAD:
                self._failed, self.head.status = True, 431 if self.head.incomplete else 400
        if self._failed:
            self._refuse(self.head.status)
        self._settle()

    def ended(self) -> bool:
        """The client sends no more. Return whether to keep the connection for replies."""
        self._ended = True
        if self._closing:
            return False
        if self._in_body and self._refusal is None:
            self._refuse(400)
            return True
        return self._at_work > 0

    # --- events of the parser

    def message_begin(self) -> None:
        """A request begins. Raises HttpRefusal."""
        if self._at_work >= MAX_PIPELINED:
            raise self.head.refuse(400)
        self.head.begin()
        self._began = True
        self._authenticated = False
        self._unfinished = 0

    def head_complete(self) -> None:
        """The head is complete, and uvicorn has called the application."""
        self.head.incomplete, self._in_body, self._progressed = False, True, True
        self._unfinished = 0
        self._at_work += 1

    def body(self) -> None:
        """A piece of the body has arrived."""
        self._unfinished = 0
        self._progressed = True

    def message_complete(self) -> None:
        """The request is complete."""
        self._in_body = False

    # --- calls of uvicorn

    def may_write(self, data: bytes) -> bool:
        """Whether to send uvicorn's bytes. What it writes while it parses is its own reply to malformed HTTP."""
        if self._parsing or self._closing or (self._refusal is not None and self._at_work <= self._in_body):
            return False
        if not data.startswith(_CONTINUE):
            self._writing = True
        return True

    def close(self, *, linger: bool) -> None:
        """Close the connection; with `linger`, after the client has received the reply. A call while uvicorn parses
        means that parsing has failed.
        """
        if self._parsing:
            self._failed = True
        elif not self._closing:
            self._closing = True
            if self._ended or not linger or self._transport.is_closing() or not self._transport.can_write_eof():
                self._transport.close()
            else:
                self._since, self._received = time.monotonic(), 0
                self._transport.write_eof()
                self._transport.resume_reading()
                self._table.move(self, Pool.LINGERING)

    def is_closing(self) -> bool:
        """Whether the connection is closing."""
        return self._closing or self._transport.is_closing()

    @property
    def has_replied(self) -> bool:
        """Whether a reply may be in transit."""
        return self._at_work > 0

    # --- calls of the table

    def look(self, now: float) -> None:
        """Close the connection if it has missed a deadline."""
        size = self._transport.get_write_buffer_size()
        if size:
            if size != self._stuck[0]:
                self._stuck = size, now
            elif now - self._stuck[1] > SILENCE_TIMEOUT:
                self._transport.abort()
            return
        self._stuck = 0, now
        if self.pool is Pool.LINGERING:
            late = now > self._since + LINGER_TIMEOUT
        elif self.pool is Pool.WAITING or (self._in_body and not self._at_work):
            pace = START_TIMEOUT + self._received / PACE
            late = now > min(self._heard + SILENCE_TIMEOUT, self._since + pace)
        else:
            # uvicorn closes the other idle ones. After a refusal the client gets less time.
            late = self.pool is Pool.IDLE and self._refused and now > self._since + SILENCE_TIMEOUT
        if late:
            self._transport.abort()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # --- internal

    def _settle(self) -> None:
        """Move to the pool of the present state."""
        if self._closing:
            return
        if self._at_work:
            pool = (
                Pool.AT_WORK if not self._in_body else (Pool.AUTHENTICATED_BODY if self._authenticated else Pool.BODY)
            )
        elif self._in_body:
            pool = Pool.BODY
        elif self.head.incomplete or self.pool is Pool.WAITING:
            pool = Pool.WAITING
        else:
            pool = Pool.IDLE
        if pool is not self.pool:
            self._since, self._received = time.monotonic(), 0
            self._table.move(self, pool)

    def _refuse(self, status: int) -> None:
        self._refusal = status
        self._deliver()

    def _deliver(self) -> None:
        """Send the refusal, after the replies to the requests before it."""
        if self._at_work > self._in_body or self._closing:
            return
        status = HTTPStatus(self._refusal or 400)
        if not self._in_body:
            log.info("request.malformed", status=int(status), peer=self.peer)
        if not self._writing and (self._at_work or not self._in_body):
            body = f"{status.phrase.lower()}\n"
            self._transport.write(
                (
                    f"HTTP/1.1 {int(status)} {status.phrase}\r\nConnection: close\r\n"
                    "Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}"
                ).encode("ascii")
            )
        self.close(linger=True)
