"""The networks of hosts: what a link that is down does to a connection, and that nothing is left of them."""

from __future__ import annotations

import socket
import subprocess

import pytest

from tests.faults.network import ip, missing, network

# Says what it hears on a connection from there to here, until that ends.
_ECHO = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
while data := connection.recv(99):
    connection.sendall(data)
"""


def test_a_link_that_is_down_swallows_everything() -> None:
    """Both sides go on as if the other were slow; what was sent arrives once the link is up."""
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
