"""gunicorn's ASGI worker, made to stand without a proxy: slow clients are hung up on, and every answer is taken or lost
by its client.

gunicorn's own keeps a connection for as long as its client likes, drops what it was about to answer when the client has
sent all it had to say, closes a connection so that an answer on its way may be lost, and quotes the request in answers
and log lines. Here reading has the deadlines of receiver.web.gunicorn_connection, looked after once in a while for all
connections together; a body that broke off or was malformed is told to the application, which answers; and a connection
that ends is read a little longer, until its client has taken the answer.

May not judge a request: only what is no HTTP is answered here.
"""

from __future__ import annotations

import asyncio
import math
import os
from http import HTTPStatus
from typing import Any, Final

import structlog
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.asgi import parser, protocol  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.asgi.lifespan import LifespanManager  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.workers.gasgi import ASGIWorker  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver.web import lean
from receiver.web.gunicorn_connection import FIRST, PACE, SILENCE, START
from receiver.web.gunicorn_threads import answered
from receiver.web.transfer import SMALL

log: Final = structlog.get_logger(__name__)

# How often connections are looked at, in seconds: a deadline is kept to within so much.
_LOOK: Final = 0.5
# A connection that ends is read for so many seconds and bytes more: closed at once, what the client is still sending
# would destroy the answer on its way.
_LINGER: Final = 2.0
_DRAIN: Final = 1024 * 1024


class _ExpectationFailed(parser.ParseError):  # type: ignore[misc]  # gunicorn ships no types
    """The client expects what nobody here does (RFC 9110 section 10.1.1)."""


# By name, for the parser in C has classes of its own.
_STATUSES: Final = {"LimitRequestLine": 414, "LimitRequestHeaders": 431, "_ExpectationFailed": 417,
                    "UnsupportedTransferCoding": 501}


class _Receiver(protocol.BodyReceiver):  # type: ignore[misc]  # gunicorn ships no types
    """A body on its way to the application. When it is late is the connection's to say."""

    malformed = False

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await super().receive()
        if self.malformed and message["type"] == "http.disconnect":
            message["malformed"] = True
        return message

    async def _wait_for_data(self) -> None:
        self._waiter: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Connection(protocol.ASGIProtocol):  # type: ignore[misc]  # gunicorn ships no types
    """One connection. Times are those of the event loop."""

    _body_receiver: _Receiver | None
    _closed: bool
    _keepalive: int

    _ended = False  # the client has said all it will
    _broken = False  # what it says cannot be read any more
    _lingering = False
    _began: float | None = None  # the first byte of a request that is on its way
    _received = 0
    _stuck: tuple[int, float] | None = None  # bytes that the client does not take, and since when

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        # Read ahead of the application no more than what every request may have without asking.
        self._max_buffer_size = SMALL

    def connection_made(self, transport: Any) -> None:
        """Begin. When there are too many, another makes place (`Worker.make_place`)."""
        self._heard = self.worker.loop.time()
        has_place = self.worker.make_place()
        self.worker.connections[self] = None
        super().connection_made(transport)
        if not has_place:
            self.hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, and let the task that serves the connection end too."""
        self.worker.connections.pop(self, None)
        super().connection_lost(exc)
        if self._awaiting_request:
            self._request_ready.set()

    def data_received(self, data: bytes) -> None:
        """Take in what the client sent."""
        first, self._heard = self.req_count <= 1 and not self._received, self.worker.loop.time()
        self._received += len(data)
        if self._lingering or self._broken:
            if self._received > _DRAIN:
                self.transport.abort()
        elif first and data[0] not in FIRST:
            self._refuse(parser.InvalidRequestLine(""))
        else:
            super().data_received(data)

    def eof_received(self) -> bool:
        """The client has said all it will; whether it may still be answered."""
        self._ended = True
        receiver = self._body_receiver
        if self._lingering or self._websocket or (receiver is None and self._awaiting_request):
            return False
        if receiver is not None and not receiver._complete:  # gunicorn has no other word for it
            receiver.signal_disconnect()
        return True

    def look(self, now: float) -> None:
        """Hang up on a client that is too slow, or on one that says nothing while we are about to end."""
        if self._lingering:
            if now - self._lingers > _LINGER:
                self.transport.abort()
        elif self._flow_control.write_paused:
            size = self.transport.get_write_buffer_size()
            if self._stuck is None or size != self._stuck[0]:
                self._stuck = size, now
            elif now - self._stuck[1] > SILENCE:
                self.transport.abort()
        elif self._began is not None:
            if now > min(self._heard + SILENCE, self._began + START + self._received / PACE):
                self._give_up()
        elif self._awaiting_request:
            patience = _LOOK if not self.worker.alive else SILENCE if self.req_count <= 1 else math.inf
            if self._ended or now > self._heard + patience:
                self._close_transport()

    @property
    def spare(self) -> tuple[int, float] | None:
        """How well it can be spared, and since when, the best first: it has its answer, says nothing, or is sending.
        None: a request of it is at work.
        """
        if self._lingering:
            return 0, self._lingers
        if self._began is not None:
            return 2, self._began
        return (1, self._heard) if self._current_request is None else None

    def hang_up(self) -> None:
        """End at once."""
        self.transport.abort()

    def _give_up(self) -> None:
        self._began = None
        if self._body_receiver is None:
            self._close_transport()
        else:
            self._body_receiver.signal_disconnect()

    # --- what gunicorn calls

    def _feed_callback_parser(self, data: bytes) -> bool:
        if self._began is None and not self._callback_parser.is_complete:
            self._began, self._received = self._heard, len(data)
        try:
            self._callback_parser.feed(data)
        except Exception as exc:  # noqa: BLE001 - whatever a parser cannot read
            self._refuse(exc)
            return False
        return True

    def _on_headers_complete(self) -> bool:
        headers = getattr(self._callback_parser, "asgi_headers", None) or self._callback_parser.headers
        for name, value in headers:
            if name == b"expect" and value.lower() != b"100-continue":
                raise _ExpectationFailed
        skip: bool = super()._on_headers_complete()
        self._body_receiver = _Receiver(self._current_request, self)
        return skip

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        self._began = None

    def _refuse(self, exc: Exception) -> None:
        """Answer what is no HTTP with its status alone, or have the application answer for a body that is none."""
        self._broken, self._began = True, None
        receiver = self._body_receiver
        if receiver is not None:
            receiver.malformed = True
            receiver.signal_disconnect()
            return
        status = _STATUSES.get(type(exc).__name__, 400)
        peer = self.transport.get_extra_info("peername")
        log.info("request.malformed", status=status, error=type(exc).__name__, peer=peer[0] if peer else None)
        self._send_error_response(status, "")
        self._close_transport()

    def _send_error_response(self, status: int, message: str, extra_headers: object = ()) -> None:  # noqa: ARG002
        status = HTTPStatus.SERVICE_UNAVAILABLE if status == HTTPStatus.INTERNAL_SERVER_ERROR else status
        phrase = HTTPStatus(status).phrase
        body = f"{phrase.lower()}\n"
        self._safe_write((
            f"HTTP/1.1 {int(status)} {phrase}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Cache-Control: no-store\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode("ascii"))

    def _send_response_start(self, status: int, headers: Any, request: Any, close: bool = False) -> None:
        # gunicorn writes an application's Connection field, and does not follow it.
        if any(name.lower() == b"connection" and value == b"close" for name, value in headers):
            self._keepalive = 0
        super()._send_response_start(status, headers, request, close)

    async def _handle_http_request(self, *args: Any, **kwargs: Any) -> bool:
        keep: bool = await super()._handle_http_request(*args, **kwargs)
        answered()
        return keep

    def _is_websocket_upgrade(self, request: object) -> bool:  # noqa: ARG002 - the signature is gunicorn's
        return False  # there are none here: the request is what it is without

    def _close_transport(self) -> None:
        if self._closed or self.transport is None:
            return
        self._closed = True  # for gunicorn: nothing more is read as a request, nor answered
        if self._ended or self.transport.is_closing():
            self.transport.close()
            return
        self._lingering, self._received, self._lingers = True, 0, self.worker.loop.time()
        self.transport.write_eof()
        self._resume_reading()


class Worker(ASGIWorker):  # type: ignore[misc]  # gunicorn ships no types
    """As many connections as `worker_connections`, in one event loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections: dict[Connection, None] = {}  # in the order in which they were made

    @classmethod
    def check_config(cls, cfg: object, log: object) -> None:
        """Nothing to warn of: `threads` are the application's, for what may not be done in the event loop."""

    def load_wsgi(self) -> None:
        """Import the application."""
        super().load_wsgi()
        lean.settle()

    def make_place(self) -> bool:
        """Whether there is place for one more. When there are too many, who can be spared best is hung up on."""
        if len(self.connections) < self.worker_connections:
            return True
        spares = [(spare, each) for each in self.connections if (spare := each.spare) is not None]
        if not spares:
            return False
        _, last = min(spares, key=lambda pair: pair[0])
        del self.connections[last]
        last.hang_up()
        return True

    async def _serve(self) -> None:
        self.lifespan = LifespanManager(self.asgi, self.log, self.state)
        try:
            await self.lifespan.startup()
        except RuntimeError as exc:
            log.error("receiver.not_started",
                      error="; ".join(str(exc).removeprefix("Lifespan startup failed: ").splitlines()))
            self.lifespan = None
            raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from None
        for listener in self.sockets:
            self.servers.append(await self.loop.create_server(lambda: Connection(self), sock=listener.sock))
        looking = asyncio.create_task(self._look())
        while self.alive and self.ppid == os.getppid():
            self.notify()
            await asyncio.sleep(_LOOK)
        await self._shutdown()
        looking.cancel()

    async def _look(self) -> None:
        while True:
            now = self.loop.time()
            for connection in list(self.connections):
                connection.look(now)
            await asyncio.sleep(_LOOK)
