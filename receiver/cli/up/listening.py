"""The listening sockets of `up`, and whether something answers at them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Final

from receiver import settings as table
from receiver.cli.up.child_processes import POLL_INTERVAL
from receiver.errors import ConfigurationError

# Seconds to wait for a port that processes of a killed `up` may still hold.
PORT_TIMEOUT: Final = 45.0

# The listen backlog, as in gunicorn: connections that wait while the receiver restarts.
BACKLOG: Final = 2048


@contextmanager
def listen(bind: str, field: str, timeout: float) -> Iterator[socket.socket]:
    """A listening socket. `up` creates it, so that it knows port 0, and connections wait while the receiver restarts.

    `timeout`: seconds to retry while the port is in use. Raises ConfigurationError.
    """
    host, _, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    until = time.monotonic() + timeout
    while True:
        try:
            made = socket.create_server(
                (host, int(port)), backlog=BACKLOG, family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as exc:
            if time.monotonic() < until:
                time.sleep(POLL_INTERVAL)
                continue
            # The exception's own text is long. A host name that cannot be resolved has a negative number.
            why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
            option = f"--{field.replace('_', '-')}"
            raise ConfigurationError(
                f"cannot listen at {bind} ({why}): choose another with {option} or {table.variable(field)}"
            ) from exc
        with made:
            yield made
        return


def address_of(bind: str, listener: socket.socket) -> str:
    """HOST:PORT with the requested host and the actual port."""
    return f"{bind.rpartition(':')[0]}:{listener.getsockname()[1]}"


def answers(listener: socket.socket, path: str) -> bool:
    """Return whether GET `path` at this socket is answered 200."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - connects, does not bind
    connection = HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
