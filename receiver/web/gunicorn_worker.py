"""gunicorn's threaded worker, made to stand without a proxy: slow clients cost it no request thread.

gthread lets a connection hold one of its few threads for as long as its client likes: while the head comes, while the
body comes; and a finished connection may hold up its main loop. Here a connection that says nothing waits in the
poller; reading has a deadline, and takes no place from the requests at work; who has read also waits for the client to
take the answer. gunicorn's own error pages and log lines quote the request; here they do not.

May not judge a request: only what is no HTTP is answered here.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from selectors import EVENT_READ
from typing import TYPE_CHECKING, Any, Final

import structlog
from gunicorn import util  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.http import errors  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.http.unreader import SocketUnreader  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver.errors import ConfigurationError
from receiver.failpoints import point

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log: Final = structlog.get_logger(__name__)

answered = point("door.answered")

# A client that is silent for so long is gone. Proxies have 10 to 60 seconds here; behind one, these never count.
SILENCE: Final = 10.0
# While we wait for a request it must come at this pace, after a start that covers a slow line's handshakes.
START: Final = 15.0
PACE: Final = 64 * 1024
# What is at once told apart from a request line, such as a TLS handshake: its client would only wait.
FIRST: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\r")

_STATUSES: Final = (
    (errors.LimitRequestLine, 414), (errors.LimitRequestHeaders, 431), (errors.ExpectationFailed, 417),
    (errors.UnsupportedTransferCoding, 501), (errors.InvalidResponseHeader, 503),
    (errors.InvalidResponseHeaderName, 503), (errors.ParseException, 400),
)


class _Unreader(SocketUnreader):  # type: ignore[misc]  # gunicorn ships no types
    """Reads from a connection, within its deadlines. Raises NoMoreData beyond them: the client is as good as gone."""

    _fresh = True

    def begin(self) -> None:
        """A request may begin now."""
        self._left = START

    def chunk(self, size_hint: int | None = None) -> bytes:
        if self._left <= 0:
            raise errors.NoMoreData
        self.sock.settimeout(min(SILENCE, self._left))
        asked = time.monotonic()
        try:
            data: bytes = super().chunk(size_hint)
        except TimeoutError as exc:
            raise errors.NoMoreData from exc
        if self._fresh and data and data[0] not in FIRST:
            raise errors.InvalidRequestLine("")
        self._fresh = False
        # What we take for ourselves between two pieces is not held against the client.
        self._left += len(data) / PACE - (time.monotonic() - asked)
        return data


class _Connection(TConn):  # type: ignore[misc]  # gunicorn ships no types
    """A connection that is closed once, by whoever comes first."""

    closed = False

    def init(self) -> None:
        """Make the parser, once; it reads through `_Unreader`."""
        super().init()
        if not isinstance(self.parser.unreader, _Unreader):
            self.parser.unreader = _Unreader(self.sock)
        self.parser.unreader.begin()

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully in a thread that may wait for the client to take the answer."""
        if not self.closed:
            self.closed = True
            super().close(graceful)


class _Body:
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


class _Continue:
    """Sends "100 Continue" when the body is first asked for: a refused request's never is (RFC 9110 section 10.1.1)."""

    def __init__(self, connection: socket.socket, *, expected: bool) -> None:
        self._connection, self._expected = connection, expected

    def __call__(self) -> None:
        if self._expected:
            self._expected = False
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn ships no types
    """As many requests at work as there are `threads`; as many readers as there are connections."""

    def init_process(self) -> None:
        """Prepare, after fork."""
        self._places = threading.BoundedSemaphore(self.cfg.threads)
        super().init_process()

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """Threads are made when there is something to read and none is idle; a waiting one costs little."""
        return ThreadPoolExecutor(self.worker_connections, thread_name_prefix="request")

    def load_wsgi(self) -> None:
        """Put ours between the server and the application. What keeps it from starting is told as any line is."""
        try:
            self._application: WSGIApplication = self.app.wsgi()
        except ConfigurationError as exc:
            log.error("receiver.not_started", error="; ".join(str(exc).splitlines()))
            sys.exit(Arbiter.APP_LOAD_ERROR)
        self.wsgi = self._serve

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection; it waits in the poller until its client says something."""
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was quicker
            return
        connection = _Connection(self.cfg, client, address, listener.getsockname())
        connection.timeout = time.monotonic() + SILENCE
        self.nr_conns += 1
        self.pending_conns.append(connection)
        self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, connection))

    def set_accept_enabled(self, enabled: bool) -> None:
        """Listen, or do not. A worker that stops takes those who have connected already, for the kernel would hang up
        on them when the last of us closes; and who comes then is refused at once, and not left to wait for that.
        """
        super().set_accept_enabled(enabled)
        if self.alive:
            return
        for listener in self.sockets:
            before = -1
            while before < self.nr_conns < self.worker_connections:
                before = self.nr_conns
                self.accept(listener)
            listener.close()

    def handle(self, conn: _Connection) -> Any:
        """Serve one request, in a reader's thread."""
        if conn.initialized:
            conn.parser.unreader.begin()
        keep = super().handle(conn)
        if not keep:
            conn.close(graceful=True)  # waits up to two seconds; gunicorn does so in the main loop
        return keep

    def handle_request(self, req: Any, conn: _Connection) -> Any:
        """As gunicorn, but the "100 Continue" is left to whoever reads the body."""
        req._expected_100_continue = False
        keep = super().handle_request(req, conn)
        answered()
        return keep

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        response: Any = start_response.__self__  # type: ignore[attr-defined]  # gunicorn's Response
        response.version = "redox-receiver"  # the Server header

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            if ("Connection", "close") in headers:  # gunicorn drops an application's Connection header
                response.force_close()
            return start_response(status, headers, exc_info)

        expected = environ.get("HTTP_EXPECT", "").lower() == "100-continue" and response.req.version >= (1, 1)
        environ["wsgi.input"] = _Body(environ["wsgi.input"], self._places,
                                      _Continue(environ["gunicorn.socket"], expected=expected))
        with self._places:
            return self._application(environ, start)

    def _cap_keepalive(self, deadline: float) -> None:
        """When the worker stops: connections on which nobody has said anything are not waited for either."""
        super()._cap_keepalive(deadline)
        for connection in self.pending_conns:
            connection.timeout = min(connection.timeout, deadline)

    def handle_error(self, req: object, client: socket.socket, addr: Any, exc: Exception) -> None:  # noqa: ARG002
        """Answer what is no HTTP with its status alone. The signature is gunicorn's."""
        status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), 503)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            log.error("request.failed", exc_info=exc)
        else:
            log.info("request.malformed", status=status, error=type(exc).__name__, peer=addr[0] if addr else None)
        phrase = HTTPStatus(status).phrase
        body = f"{phrase.lower()}\n"
        answer = (f"HTTP/1.1 {status} {phrase}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
                  f"Cache-Control: no-store\r\nContent-Length: {len(body)}\r\n\r\n{body}")
        with suppress(OSError):  # it did not wait for an answer
            util.write_nonblock(client, answer.encode("ascii"))
