"""A small real HTTP server that does to each request what its script says, and remembers what it got."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A request as it arrived. Header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


Behaviour = Callable[[BaseHTTPRequestHandler, Received], None]


def answer(status: int, body: bytes = b"", media: str = "text/plain") -> Behaviour:
    """Answer with that status."""

    def behave(handler: BaseHTTPRequestHandler, _: Received) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", media)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def hang_up(handler: BaseHTTPRequestHandler, _: Received) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def then_close(behaviour: Behaviour) -> Behaviour:
    """Close the connection after it, without having announced that."""

    def behave(handler: BaseHTTPRequestHandler, received: Received) -> None:
        behaviour(handler, received)
        handler.close_connection = True

    return behave


def late(until: Event) -> Behaviour:
    """Answer 200, but not before `until` is set."""

    def behave(handler: BaseHTTPRequestHandler, received: Received) -> None:
        until.wait(30)
        handler.close_connection = True
        answer(200)(handler, received)

    return behave


class Door:
    """Serves on a random port of 127.0.0.1 while it is entered. Without a script it answers 200."""

    def __init__(self, *script: Behaviour) -> None:
        self.script = deque(script)
        self.received: list[Received] = []
        self.connections = 0
        self._lock = Lock()
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                with door._lock:
                    door.connections += 1
                super().setup()

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # the other side has lost our answer on purpose
                    self.close_connection = True

            def do_POST(self) -> None:
                self._do(self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self) -> None:
                self._do(b"")

            def _do(self, body: bytes) -> None:
                received = Received(
                    method=self.command,
                    target=self.path,
                    body=body,
                    headers={name.lower(): value for name, value in self.headers.items()},
                )
                with door._lock:
                    door.received.append(received)
                    behave = door.script.popleft() if door.script else answer(200)
                behave(self, received)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def wrap(self, tls: SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
