"""One client's connection: what of a request has come, what was replied, and until when it may stay.

- What is not HTTP is answered with its status alone, once the requests before it have their replies.
- A connection that is closed after a reply is read a little longer, until its client has taken the reply.
- A client that sends or reads too slowly is closed; receiver.server.connections says which one is closed when there
  are too many.

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

# Requests on one connection that wait for their replies: a client that sends more does not wait for any.
MAX_PIPELINED: Final = 64
# After a reply a connection is read for so many seconds and bytes more: closed at once, what the client is still
# sending would destroy the reply on its way.
LINGER_TIMEOUT: Final = 2.0
MAX_LINGER: Final = 1024 * 1024
_CONTINUE: Final = b"HTTP/1.1 100 "


class ClientConnection:
    """What of a request has come, what was replied, and until when it may stay. Times are monotonic."""

    def __init__(self, table: ConnectionTable) -> None:
        self.pool = Pool.WAITING
        self.dropped = False
        self.network = self.peer = ""
        self.head = RequestHead()
        self._table = table
        self._transport: asyncio.Transport
        self._since = self._heard = 0.0  # it entered its pool; its client said something
        self._received = 0  # bytes, since `_since`
        self._parsing = self._failed = False
        self._in_body = self._began = self._progressed = False
        self._unfinished = 0  # bytes of a head, or of what is between two pieces of a body
        self._at_work = 0  # requests without a reply
        self._authenticated = self._writing = False
        self._refusal: int | None = None
        self._refused = self._ended = self._closing = False
        self._stuck: tuple[int, float] = 0, 0.0  # bytes that the client does not take, and since when

    # --- what the endpoint says (receiver.web.asgi_request.ServerConnection)

    def mark_authenticated(self) -> None:
        """The head of the request proves whose it is."""
        self._authenticated = True
        if self._in_body:
            self._settle()

    def replied(self, *, refused: bool) -> None:
        """A reply was handed over."""
        self._at_work -= 1
        self._writing, self._refused = False, refused
        if self._refusal is not None:
            self._deliver()
        elif self._at_work == 0 and (self._ended or self.head.upgrade):
            self.close(linger=not self._ended)
        self._settle()

    # --- what asyncio says

    def made(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        """It is there. Where every other is at work, it is closed at once."""
        self._transport = transport
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = str(peer[0])
            self.network = network_of(self.peer)
        self._since = self._heard = time.monotonic()
        if not self._table.add(self, loop):
            transport.abort()

    def lost(self) -> None:
        """It is gone."""
        self._closing = True
        self._table.remove(self)

    def before_parsing(self, data: bytes) -> bool:
        """Take notice of data; whether it is to be parsed."""
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
        """uvicorn has parsed it."""
        self._parsing = False
        if not self._failed and (self.head.incomplete or self._in_body) and not self._progressed:
            # Where a request begins in the midst of data, what came before is not its own.
            self._unfinished += 0 if self._began else len(data)
            if self._unfinished > MAX_HEAD:
                self._failed, self.head.status = True, 431 if self.head.incomplete else 400
        if self._failed:
            self._refuse(self.head.status)
        self._settle()

    def ended(self) -> bool:
        """The client has said all that it will; whether it may still be answered."""
        self._ended = True
        if self._closing:
            return False
        if self._in_body and self._refusal is None:
            self._refuse(400)
            return True
        return self._at_work > 0

    # --- what the parser says

    def message_begin(self) -> None:
        """A request begins. Raises HttpRefusal."""
        if self._at_work >= MAX_PIPELINED:
            raise self.head.refuse(400)
        self.head.begin()
        self._began = True
        self._authenticated = False
        self._unfinished = 0

    def head_complete(self) -> None:
        """The head is whole, and the request handed over."""
        self.head.incomplete, self._in_body, self._progressed = False, True, True
        self._unfinished = 0
        self._at_work += 1

    def body(self) -> None:
        """A piece of the body."""
        self._unfinished = 0
        self._progressed = True

    def message_complete(self) -> None:
        """The request is whole."""
        self._in_body = False

    # --- what uvicorn does

    def may_write(self, data: bytes) -> bool:
        """Whether uvicorn's bytes are sent. What it writes while it parses is its answer to what is not HTTP."""
        if self._parsing or self._closing or (self._refusal is not None and self._at_work <= self._in_body):
            return False
        if not data.startswith(_CONTINUE):
            self._writing = True
        return True

    def close(self, *, linger: bool) -> None:
        """Close; where a reply is on its way, when the client has taken it. Not what uvicorn closes while it parses."""
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
        """Whether it closes."""
        return self._closing or self._transport.is_closing()

    @property
    def has_replied(self) -> bool:
        """Whether a reply may be on its way."""
        return self._at_work > 0

    # --- what the table says

    def look(self, now: float) -> None:
        """Close the connection if it is late."""
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
            # uvicorn closes the others that are idle. One that was refused has as long as one that is silent.
            late = self.pool is Pool.IDLE and self._refused and now > self._since + SILENCE_TIMEOUT
        if late:
            self._transport.abort()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # --- its own

    def _settle(self) -> None:
        """Enter the pool that fits."""
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
        """Answer what was refused, when the requests before it have their replies."""
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
