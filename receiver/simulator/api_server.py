"""The HTTP server of the simulated Redox API, with TLS if an SSL context is passed.

Must not be reachable from another machine.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol

from receiver.fault_injection import api_faults
from receiver.fault_injection.api_faults import ApiFault
from receiver.simulator.api_exchange import Received, SimulatedApiAnswer

_LARGEST_MESSAGE: Final = 40 * 1024 * 1024


class ServedApi(Protocol):
    """What the server asks of the API for each request."""

    now: Callable[[], datetime]
    redirect_to: str

    def record(self, request: Received) -> None:
        """Keep the request for the test."""

    def next_fault(self, path: str) -> ApiFault | SimulatedApiAnswer | None:
        """Remove and return the next fault at `path`."""

    def answer(self, request: Received) -> SimulatedApiAnswer:
        """Return the response that Redox would send."""


class ApiServer(ThreadingHTTPServer):
    """The server. Each connection has its own thread. `stop` ends all of them."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api: ServedApi, ssl_context: ssl.SSLContext | None) -> None:
        self.api = api
        self.stopping = threading.Event()
        self._ssl_context = ssl_context
        self._open: set[socket.socket] = set()
        super().__init__(address, _ApiConnection)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        if self._ssl_context is not None:  # the handshake is done in the connection's thread
            connection = self._ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._open.add(connection)
        return connection, peer

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that disconnect or reject the certificate. Report all other errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Close every connection, and stop."""
        self.stopping.set()
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):  # its own thread has already closed it
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()


class _ApiConnection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one response, one write
    server: ApiServer

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(10)
            self.request.do_handshake()
            self.request.settimeout(None)
        super().setup()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the base class's name
        """Log nothing: a URL may name a patient."""

    def _serve(self) -> None:
        api = self.server.api
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LARGEST_MESSAGE or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._write(SimulatedApiAnswer(status=413 if length else 411))
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Received(method=self.command, path=self.path, headers=headers, body=self.rfile.read(length))
        if len(request.body) < length:
            self.close_connection = True
            return
        api.record(request)
        fault = api.next_fault(self.path)
        if isinstance(fault, ApiFault):
            self._fail(fault, api.answer(request) if fault in api_faults.PROCESSED else None)
        else:
            self._write(api.answer(request) if fault is None else fault)

    def _fail(self, fault: ApiFault, answer: SimulatedApiAnswer | None) -> None:
        found = api_faults.complete_response(fault, self.server.api.redirect_to)
        if found is not None:
            status, body, headers = found
            self._write(SimulatedApiAnswer(status=status, body=body, headers=headers))
            return
        self.close_connection = True
        api_faults.break_connection(
            fault, self._send, b"" if answer is None else self._bytes_of(answer), self.server.stopping
        )

    def _write(self, answer: SimulatedApiAnswer) -> None:
        self._send(self._bytes_of(answer))

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _bytes_of(self, answer: SimulatedApiAnswer) -> bytes:
        body = answer.body
        media = "application/json" if isinstance(body, dict) else "text/plain; charset=utf-8"
        text = json.dumps(body) if isinstance(body, dict) else body
        content = text.encode() if isinstance(text, str) else text
        headers = {
            "Date": format_datetime(self.server.api.now(), usegmt=True),
            "Content-Type": media,
            "Content-Length": str(len(content)),
            **answer.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        reason = self.responses[answer.status][0]
        return f"HTTP/1.1 {answer.status} {reason}\r\n{head}\r\n".encode("latin-1") + content
