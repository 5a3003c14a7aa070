"""The worker that serves our listeners: a small request is taken in by the main loop, all else by threads.

A thread for a request costs more than the request: it is woken for it, woken again by the ledger, and each time waits
its turn at the interpreter. So what has come whole, and is for an application that never waits (`never_waits`), is
begun in the main loop; its answer is Pending, and while the ledger writes the loop goes on. What waits for a handler, a
body or a client is a thread's, as ever (receiver.web.gunicorn_threads).

May not wait in the main loop for anything but the poller.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import takewhile
from selectors import EVENT_READ
from typing import Any, Final

from gunicorn.http import errors, wsgi  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver.web.gunicorn_connection import SILENCE, Connection
from receiver.web.gunicorn_threads import Threads, answered, drained, starter
from receiver.web.pending import Pending
from receiver.web.steps import Call, Wait
from receiver.web.transfer import SMALL

# As much as a head may have, and a small body.
_READ: Final = SMALL + 16 * 1024
_LENGTH: Final = re.compile(rb"\r\ncontent-length:([^\r]*)", re.IGNORECASE)
_OTHERWISE: Final = re.compile(rb"\r\n(?:transfer-encoding|expect|upgrade)[ \t]*:", re.IGNORECASE)


class _Sink:
    """Takes what gunicorn's Response writes, so that it is sent at once."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        """Keep it."""
        self._written.append(data)

    def taken(self) -> bytes:
        """All of it."""
        return b"".join(self._written)


@dataclass(slots=True, eq=False)
class _Exchange:
    """A request that was begun in the main loop, and its answer.

    `late`: when it is given up waiting. `welcome`: whether the door would have the connection kept.
    """

    connection: Connection
    request: Any
    response: Any
    environ: dict[str, Any]
    sink: _Sink
    began: float
    pending: Pending | None = None
    step: Wait | None = None
    late: float = 0.0
    welcome: bool = True


class Worker(Threads):
    """Requests that have come whole in the main loop; others in threads."""

    def init_process(self) -> None:
        """Prepare, after fork."""
        self._ended: deque[tuple[_Exchange, Wait]] = deque()
        self._rung = False
        self._waiting: dict[_Exchange, None] = {}
        self._hasten: dict[Callable[[], None], None] = {}
        super().init_process()

    def load_wsgi(self) -> None:
        """Ask the application whether it ever waits."""
        super().load_wsgi()
        self._at_once = getattr(self._application, "never_waits", False) and not self.cfg.is_ssl

    # --- what the poller tells

    def on_pending_socket_readable(self, conn: Connection, client: Any) -> None:
        """A connection has something to say, or has ended."""
        self.on_client_socket_readable(conn, client)

    def on_client_socket_readable(self, conn: Connection, client: Any) -> None:
        """A connection has something to say, or has ended."""
        if conn.busy:  # it does not wait for its answer: what it says now has time until then
            self._unpoll(conn)
            return
        kept, conn.kept = conn.kept, True
        if self._at_once and self._take_in(conn):
            (self.keepalived_conns if kept else self.pending_conns).remove(conn)
        elif kept:
            super().on_client_socket_readable(conn, client)
        else:
            super().on_pending_socket_readable(conn, client)

    def _take_in(self, conn: Connection) -> bool:
        """Read, and begin the request that has come whole, if one has; else a thread goes on reading."""
        try:
            data = conn.sock.recv(_READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end(conn)
            return True
        request = None
        try:
            if conn.initialized:
                conn.parser.unreader.begin()
            else:
                conn.init()
                conn.sock.setblocking(False)
            unreader = conn.parser.unreader
            unreader.take(data)
            if not _whole(data):
                return False
            conn.busy = unreader.whole = True
            request = next(conn.parser)
            self._begin(conn, request)
        except (StopIteration, errors.NoMoreData):
            self._end(conn)
        except Exception as exc:  # noqa: BLE001 - whatever a parser or an application does
            self.handle_error(request, conn.sock, conn.client, exc)
            self._end(conn, graceful=True)
        return True

    def _begin(self, conn: Connection, request: Any) -> None:
        """Call the application, and see how far it comes without waiting."""
        request._expected_100_continue = False
        self.cfg.pre_request(self, request)
        sink = _Sink()
        response, environ = wsgi.create(request, sink, conn.client, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        exchange = _Exchange(conn, request, response, environ, sink, time.monotonic())
        said = self._application(environ, starter(response))
        if isinstance(said, Pending):
            exchange.pending = said
            self._go_on(exchange, said.walk.go())
        else:
            self._write(exchange, drained(said))
            self._answer(exchange)

    # --- what it waits for

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Serve all that has something to say; then, and once for them all, say that they wait."""
        super().wait_for_and_dispatch_events(timeout)
        while self._hasten:
            self._hasten.popitem()[0]()

    def _go_on(self, exchange: _Exchange, step: Wait | Call | None) -> None:
        """Wait, or have a thread do what takes its time, or answer."""
        assert exchange.pending is not None
        if isinstance(step, Wait):
            exchange.step, exchange.late = step, time.monotonic() + step.seconds
            self._waiting[exchange] = None
            self._hasten[step.hasten] = None
            step.future.add_done_callback(partial(self._ring, exchange, step))
        elif step is not None:
            self._lend(exchange.connection, partial(self._finish, exchange, step))
        else:
            self._say(exchange)
            self._answer(exchange)

    def _ring(self, exchange: _Exchange, step: Wait, _future: object) -> None:
        """A future has ended, in another thread: the main loop is called once for all that end together."""
        self._ended.append((exchange, step))
        if not self._rung:
            self._rung = True
            self.method_queue.defer(self._resume)

    def _resume(self) -> None:
        self._rung = False  # first: what ends from now on rings again
        while self._ended:
            exchange, step = self._ended.popleft()
            if exchange.step is step:
                self._came(exchange, step)

    def murder_pending(self) -> None:
        """Close connections that say nothing; and wait no longer than one is to wait."""
        super().murder_pending()
        now = time.monotonic()
        # They wait equally long, so the first in the order of waiting are the first to be late.
        for exchange in [*takewhile(lambda each: each.late < now, self._waiting)]:
            assert exchange.step is not None
            self._came(exchange, exchange.step)

    def _came(self, exchange: _Exchange, step: Wait) -> None:
        """Go on with what a future holds, or with a TimeoutError."""
        assert exchange.pending is not None
        exchange.step = None
        del self._waiting[exchange]
        came: Any = None
        failed: Exception | None = None
        try:
            came = step.future.result(0)
        except Exception as exc:  # noqa: BLE001 - it is theirs who asked for it
            failed = exc
        try:
            self._go_on(exchange, exchange.pending.walk.go(came, failed))
        except Exception as exc:  # noqa: BLE001 - whatever an application does
            self.handle_error(exchange.request, exchange.connection.sock, exchange.connection.client, exc)
            self._end(exchange.connection, graceful=True)

    # --- the answer

    def _say(self, exchange: _Exchange) -> None:
        """Have gunicorn write the answer, into the sink."""
        assert exchange.pending is not None
        reply = exchange.pending.walk.outcome
        exchange.welcome = not reply.close
        # Nothing of it can be unread: it has come whole.
        self._write(exchange, exchange.pending.answer(replace(reply, close=False) if reply.close else reply))

    def _write(self, exchange: _Exchange, body: Iterable[bytes]) -> None:
        if not self.alive or len(self.keepalived_conns) >= self.max_keepalived:
            exchange.response.force_close()
        for piece in body:
            exchange.response.write(piece)

    def _written(self, exchange: _Exchange) -> tuple[bytes, bool]:
        """What is to be sent, and whether the connection is kept."""
        exchange.response.close()
        self.log.access(exchange.response, exchange.request, exchange.environ,
                        timedelta(seconds=time.monotonic() - exchange.began))
        self.cfg.post_request(self, exchange.request, exchange.environ, exchange.response)
        return exchange.sink.taken(), not exchange.response.should_close()

    def _answer(self, exchange: _Exchange) -> None:
        conn = exchange.connection
        data, keep = self._written(exchange)
        sent = 0
        try:
            sent = conn.sock.send(data)
        except BlockingIOError:
            pass
        except OSError:
            self._end(conn)
            return
        answered()
        if sent < len(data):
            self._lend(conn, partial(self._send, conn, data[sent:], keep))
        elif not keep:
            self._end(conn, graceful=True)
        else:
            self._idle(conn, welcome=exchange.welcome)

    def _idle(self, conn: Connection, *, welcome: bool) -> None:
        """The connection waits for its client again. Who is not welcome has as long as who has said nothing yet."""
        unreader = conn.parser.unreader
        if unreader.buf.getvalue():  # of a body that nobody has read, or of the next request
            conn.parser.finish_body()
        conn.busy = unreader.whole = False
        if unreader.buf.getvalue():
            self._lend(conn, partial(self.handle, conn))
            return
        conn.kept = welcome
        if welcome:
            conn.set_timeout()
            self.keepalived_conns.append(conn)
        else:
            conn.timeout = time.monotonic() + SILENCE
            self.pending_conns.append(conn)
        if not conn.polled:
            conn.polled = True
            self.poller.register(conn.sock, EVENT_READ, partial(self.on_client_socket_readable, conn))

    def _end(self, conn: Connection, *, graceful: bool = False) -> None:
        """Close; gracefully in a thread, which may wait for the client to take the answer."""
        self._unpoll(conn)
        self.nr_conns -= 1
        if graceful:
            self.tpool.submit(conn.close, graceful=True)
        else:
            conn.close()

    def _unpoll(self, conn: Connection) -> None:
        if conn.polled:
            conn.polled = False
            self.poller.unregister(conn.sock)

    # --- what a thread does

    def _lend(self, conn: Connection, work: Callable[[], bool]) -> None:
        """Have a thread go on with the connection; it says whether that is kept."""
        self._unpoll(conn)
        conn.polled = True  # as soon as it comes back
        conn.busy = conn.parser.unreader.whole = False
        done = self.tpool.submit(work)
        done.add_done_callback(lambda future: self.method_queue.defer(self.finish_request, conn, future))

    def _finish(self, exchange: _Exchange, step: Call) -> bool:
        """Take the steps from this one on, and answer."""
        conn, pending = exchange.connection, exchange.pending
        assert pending is not None
        try:
            with self._places:
                pending.walk.finish(step)
            self._say(exchange)
            data, keep = self._written(exchange)
        except Exception as exc:  # noqa: BLE001 - whatever an application does
            self.handle_error(exchange.request, conn.sock, conn.client, exc)
            data, keep = b"", False
        return self._send(conn, data, keep)

    def _send(self, conn: Connection, data: bytes, keep: bool) -> bool:
        """Send what the client does not take at once; whether the connection is kept."""
        try:
            conn.sock.settimeout(SILENCE)
            conn.sock.sendall(data)
        except OSError:
            keep = False
        else:
            answered()
        if not keep:
            with suppress(OSError):
                conn.close(graceful=True)
        return keep


def _whole(data: bytes) -> bool:
    """Whether that is a request with all of its body, as far as can be seen. Nobody believes it: gunicorn reads it."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = data[:end + 2]
    if _OTHERWISE.search(head):
        return False
    found = _LENGTH.search(head)
    length = b"0" if found is None else found[1].strip(b" \t")
    return length.isdigit() and len(length) < len(str(_READ)) + 1 and len(data) - end - 4 >= int(length)
