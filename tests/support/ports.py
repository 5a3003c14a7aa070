"""Ports of 127.0.0.1 for processes that cannot inherit a listening socket."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port at which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
