"""A Unix socket before PostgreSQL's, that can swallow answers and cut connections.

A client that connects to `directory` reaches the server; both are real.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import make_url

_READY = b"Z\x00\x00\x00\x05I"  # ReadyForQuery, idle (PostgreSQL: message formats)


class Wire:
    """Passes bytes on, both ways, until told otherwise."""

    def __init__(self, url: str, directory: Path) -> None:
        address = make_url(url)
        name = f".s.PGSQL.{address.query['port']}"
        self._server = str(Path(str(address.query["host"])) / name)
        self.url = address.set(query={**address.query, "host": str(directory)}).render_as_string()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / name))
        self._listener.listen()
        self._ends: list[socket.socket] = []
        # What the server says from now on reaches nobody; with `after_greeting`, from the moment it takes commands.
        self.swallow = False
        self.swallow_after_greeting = False
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """End every connection."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End every connection, and take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            self._ends += [client, server]
            self._start(self._pass, client, server, False)
            self._start(self._pass, server, client, True)

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        swallowing = False
        with suppress(OSError):
            while data := source.recv(65536):
                if not (answers and (self.swallow or swallowing)):
                    sink.sendall(data)
                swallowing |= answers and self.swallow_after_greeting and data.endswith(_READY)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire(url: str, directory: Path) -> Iterator[Wire]:
    """A wire while the block runs."""
    made = Wire(url, directory)
    try:
        yield made
    finally:
        made.close()
