"""Real gunicorn processes for tests, and connections that send raw bytes to them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from tests.support.measuring import MEASURED
from tests.support.processes import end
from tests.support.waiting import until

ROOT: Final = Path(__file__).resolve().parents[2]
OURS: Final = ("-c", "python:receiver.server.conf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer as it came. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    raw: bytes = field(repr=False)


class Wire:
    """One connection, on which bytes are sent as they are and answers read one after another.

    `tls` None: plain TCP. `source`: the local address to connect from.
    """

    def __init__(
        self, port: int, *, timeout: float = 120.0, tls: ssl.SSLContext | None = None, source: str = "127.0.0.1"
    ) -> None:
        made = socket.create_connection(("127.0.0.1", port), timeout=timeout, source_address=(source, 0))
        if made.getsockname() == made.getpeername():
            # Nothing listens, and by chance our own port is the one that we call: we would reach ourselves.
            made.close()
            raise ConnectionRefusedError
        self.socket = made if tls is None else tls.wrap_socket(made, server_hostname="127.0.0.1")
        self._rest = b""

    def send(self, data: bytes) -> Self:
        """Send bytes. If the server has closed the connection, reading its answer shows that."""
        with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            self.socket.sendall(data)
        return self

    def finish(self) -> Self:
        """Send FIN: no more will come."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def answer(self, *, to_head: bool = False) -> Answer:
        """Return the next answer. `to_head`: it has no body, whatever its head says. Raises EOFError if the connection
        ends first.
        """
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = 0 if to_head else int(headers.get("content-length", "0"))
        while len(self._rest) < length:
            self._more()
        body, self._rest = self._rest[:length], self._rest[length:]
        return Answer(status=int(status.split()[1]), headers=headers, body=body, raw=head + b"\r\n\r\n" + body)

    def ended(self) -> bool:
        """Return whether the server closes the connection and sends nothing more."""
        try:
            return not self._rest and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError("closed")
        self._rest += data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.socket.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A gunicorn that serves."""

    port: int
    process: subprocess.Popen[bytes]
    output: Path

    def wire(self, *, timeout: float = 120.0) -> Wire:
        """A new connection."""
        return Wire(self.port, timeout=timeout)

    def ask(self, data: bytes) -> Answer:
        """Send these bytes on a new connection, and return the answer."""
        with self.wire() as wire:
            return wire.send(data).answer()

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return list(psutil.Process(self.process.pid).children())

    def text(self) -> str:
        """All that it has printed."""
        return self.output.read_text()

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return its log lines, of one event or all. Fails if it has printed anything else."""
        lines = [json.loads(line) for line in self.text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    def stop(self, order: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, wait, and return the exit status."""
        self.process.send_signal(order)
        return self.process.wait(60)


def _gunicorn(arguments: Sequence[str], descriptor: int) -> Sequence[str]:
    return ["-m", "gunicorn", *arguments, "--bind", f"fd://{descriptor}"]


@contextmanager
def serving(
    directory: Path,
    environment: Mapping[str, str],
    *,
    arguments: Sequence[str] = OURS,
    program: Callable[[Sequence[str], int], Sequence[str]] = _gunicorn,
    wait: bool = True,
) -> Iterator[Server]:
    """Run a server on a random port while the block runs, with `environment` and no other RECEIVER_* variable.

    `program`: returns Python's arguments, given those of the server and the descriptor of its listening socket.
    """
    output = directory / f"gunicorn-{time.monotonic_ns()}.log"
    foreign = ("RECEIVER_", "DATABASE_URL", "PG", "GUNICORN_", "PROMETHEUS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *program(arguments, listener.fileno())],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env=kept | MEASURED | dict(environment),
        )
        server = Server(port=listener.getsockname()[1], process=process, output=output)
    try:
        if wait:
            until(lambda: _alive(server) or process.poll() is not None)
            assert process.poll() is None, server.text()
        yield server
    finally:
        end(process, 45)


def _alive(server: Server) -> bool:
    try:
        with server.wire(timeout=1) as wire:
            return wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").answer().status == 200
    except (OSError, EOFError):
        return False


def post(path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """Return the bytes of a POST. `headers` by name, with _ for -. None removes a header that is there by default."""
    given = {"host": "receiver.test", "content-type": "application/json", "content-length": str(len(body))}
    named = given | {re.sub("_", "-", name): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body
