"""Networks of hosts: a link that is down stalls its connections, and everything is removed at the end."""

from __future__ import annotations

import socket
import subprocess

import pytest

from tests.faults.network import ip, missing, network

# Echoes what it receives on a connection from the host to this machine.
_ECHO = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
while data := connection.recv(99):
    connection.sendall(data)
"""


def test_link_down() -> None:
    """While the link is down nothing arrives and no connection is closed. What was sent arrives once it is up."""
    if (why := missing()) is not None:
        pytest.skip(why)
    with network(("one", "two")) as made, socket.create_server((made.address, 0)) as listener:
        listener.settimeout(60)
        link = made.links["one"]
        there = subprocess.Popen([*link.enter, "python3", "-c", _ECHO, made.address, str(listener.getsockname()[1])])
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(60)
                connection.sendall(b"before")
                assert connection.recv(99) == b"before"
                with link.cut():
                    connection.sendall(b"meanwhile")
                    connection.settimeout(0.5)
                    with pytest.raises(TimeoutError):
                        connection.recv(99)
                    connection.settimeout(60)
                assert connection.recv(99) == b"meanwhile"
        finally:
            there.terminate()
            there.wait(30)
        names = (link.name, link.enter[-1])
    left = ip("link", "show") + ip("netns", "list")
    assert not any(name in left for name in names)
