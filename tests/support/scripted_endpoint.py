"""A small HTTP server on a real socket. A script says how it responds to each request; it records all requests."""

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
class EndpointRequest:
    """A received request. Header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


Behavior = Callable[[BaseHTTPRequestHandler, EndpointRequest], None]


def answer(status: int, body: bytes = b"", media: str = "text/plain") -> Behavior:
    """Respond with that status."""

    def behave(handler: BaseHTTPRequestHandler, _: EndpointRequest) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", media)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def hang_up(handler: BaseHTTPRequestHandler, _: EndpointRequest) -> None:
    """Close the connection without a response."""
    handler.close_connection = True


def then_close(behaviour: Behavior) -> Behavior:
    """Close the connection afterwards, without a `Connection: close` header."""

    def behave(handler: BaseHTTPRequestHandler, received: EndpointRequest) -> None:
        behaviour(handler, received)
        handler.close_connection = True

    return behave


def late(until: Event) -> Behavior:
    """Respond 200 once `until` is set."""

    def behave(handler: BaseHTTPRequestHandler, received: EndpointRequest) -> None:
        until.wait(30)
        handler.close_connection = True
        answer(200)(handler, received)

    return behave


class ScriptedEndpoint:
    """Serves on a random port of 127.0.0.1 within a `with` block. Without a script it responds 200."""

    def __init__(self, *script: Behavior) -> None:
        self.script = deque(script)
        self.received: list[EndpointRequest] = []
        self.connections = 0
        self._lock = Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                with endpoint._lock:
                    endpoint.connections += 1
                super().setup()

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # the sender has closed the connection on purpose
                    self.close_connection = True

            def do_POST(self) -> None:
                self._do(self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self) -> None:
                self._do(b"")

            def _do(self, body: bytes) -> None:
                received = EndpointRequest(
                    method=self.command,
                    target=self.path,
                    body=body,
                    headers={name.lower(): value for name, value in self.headers.items()},
                )
                with endpoint._lock:
                    endpoint.received.append(received)
                    behave = endpoint.script.popleft() if endpoint.script else answer(200)
                behave(self, received)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def wrap(self, tls: SSLContext) -> None:
        """Use TLS from now on."""
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
