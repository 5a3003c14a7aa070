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
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver.errors import ConfigurationError
from receiver.failpoints import point
from receiver.web import lean
from receiver.web.gunicorn_connection import SILENCE, Body, Connection, Continue

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log: Final = structlog.get_logger(__name__)

answered = point("door.answered")

_STATUSES: Final = (
    (errors.LimitRequestLine, 414), (errors.LimitRequestHeaders, 431), (errors.ExpectationFailed, 417),
    (errors.UnsupportedTransferCoding, 501), (errors.InvalidResponseHeader, 503),
    (errors.InvalidResponseHeaderName, 503), (errors.ParseException, 400),
)


def starter(response: Any) -> StartResponse:
    """`start_response` of gunicorn's Response, which drops an application's Connection header."""
    response.version = "redox-receiver"  # the Server header

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        if ("Connection", "close") in headers:
            response.force_close()
        write: Callable[[bytes], object] = response.start_response(status, headers, exc_info)
        return write

    return start


def drained(answer: Iterable[bytes]) -> list[bytes]:
    """All that an application answers, which is closed then (PEP 3333)."""
    try:
        return [*answer]
    finally:
        if hasattr(answer, "close"):
            answer.close()


class Threads(ThreadWorker):  # type: ignore[misc]  # gunicorn ships no types
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
        lean.settle()

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection; it waits in the poller until its client says something."""
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was quicker
            return
        connection = Connection(self.cfg, client, address, listener.getsockname())
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

    def handle(self, conn: Connection) -> Any:
        """Serve one request, in a reader's thread."""
        if conn.initialized:
            conn.parser.unreader.begin()
        keep = super().handle(conn)
        if not keep:
            conn.close(graceful=True)  # waits up to two seconds; gunicorn does so in the main loop
        return keep

    def handle_request(self, req: Any, conn: Connection) -> Any:
        """As gunicorn, but the "100 Continue" is left to whoever reads the body."""
        req._expected_100_continue = False
        keep = super().handle_request(req, conn)
        answered()
        return keep

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        response = start_response.__self__  # type: ignore[attr-defined]  # gunicorn's Response
        expected = environ.get("HTTP_EXPECT", "").lower() == "100-continue" and response.req.version >= (1, 1)
        environ["wsgi.input"] = Body(environ["wsgi.input"], self._places,
                                     Continue(environ["gunicorn.socket"], expected=expected))
        with self._places:
            # All of it: an answer may be Pending, and whoever waits for it is at work.
            return drained(self._application(environ, starter(response)))

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
