"""The connection table: which connections are closed when there are too many, by unit and under a real flood."""

from __future__ import annotations

import itertools
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from receiver.server.connections import ConnectionTable, Pool, network_of
from tests.support.server import Server, Wire
from tests.support.site import Site, sent
from tests.support.waiting import until

FLOOD = 2_600
MESSAGES = 200
HALF_HEADS = (b"", b"POST /redox/lab HTTP/1.1\r\nhost: receiver.test\r\nx-a: ")


class Loop:
    """An event loop that calls no timer."""

    def call_later(self, *_: object) -> None:
        """Not called."""


class Client:
    """A connection of a network."""

    def __init__(self, network: str) -> None:
        self.network, self.pool, self.dropped, self.aborted = network, Pool.WAITING, False, False

    def look(self, now: float) -> None:
        """Never late."""

    def abort(self) -> None:
        """The table has closed it."""
        self.aborted = True


def table(limit: int, *clients: Client) -> ConnectionTable:
    """A table with these connections."""
    made = ConnectionTable(limit)
    for each in clients:
        assert made.add(each, Loop())  # type: ignore[arg-type]
    return made


def test_a_quarter_for_a_network() -> None:
    """A network may have a quarter of all connections without a complete head, then it loses its oldest. Others do not
    count.
    """
    clients = [Client("a") for _ in range(6)]
    kept = table(16, *clients[:4])
    assert not any(each.aborted for each in clients)
    kept.move(clients[1], Pool.IDLE)
    kept.add(clients[4], Loop())  # type: ignore[arg-type]
    assert not any(each.aborted for each in clients)
    kept.add(clients[5], Loop())  # type: ignore[arg-type]
    assert [each.aborted for each in clients] == [True, False, False, False, False, False]
    kept.remove(clients[0])  # as the loop reports later
    assert len(kept) == 5


def test_the_network_with_most_makes_place() -> None:
    """When all are taken, the first pool that is not empty loses the oldest of the network with the most."""
    crowd, single = [Client("a") for _ in range(2)], Client("b")
    idle, working, late = Client("c"), [Client(f"d{n}") for n in range(4)], [Client(f"e{n}") for n in range(5)]
    kept = table(8, single, *crowd, idle, *working)
    kept.move(idle, Pool.IDLE)
    for each in working:
        kept.move(each, Pool.AT_WORK)
    order = [crowd[0], single, crowd[1], idle]
    for each, victim in zip(late, order, strict=False):
        kept.add(each, Loop())  # type: ignore[arg-type]
        kept.move(each, Pool.AT_WORK)
        assert victim.aborted
    assert not kept.add(late[4], Loop())  # type: ignore[arg-type]
    assert not any(each.aborted for each in (*working, *late))


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "20010db800000000"),
        ("2001:db8::2:0:0:1%eth0", "20010db800000000"),
        ("2001:db8:0:1::1", "20010db800000001"),
        ("", ""),
        ("a:b", "a:b"),
    ],
)
def test_networks(address: str, network: str) -> None:
    """A network is an IPv4 address, or an IPv6 /64."""
    assert network_of(address) == network


@contextmanager
def flooded(server: Server) -> Iterator[Callable[[], int]]:
    """FLOOD connections of 127.0.0.1 without a request, and 500 more a second; yields how many were made."""
    over = threading.Event()
    made = 0

    def keep() -> None:
        nonlocal made
        wires: list[socket.socket] = []
        starts = itertools.cycle(HALF_HEADS)
        while not over.is_set():
            for _ in range(50 if made < FLOOD else 5):
                try:
                    wire = socket.create_connection(("127.0.0.1", server.port), timeout=5)
                    wire.sendall(next(starts))
                    wire.setblocking(False)
                except OSError:
                    continue
                wires.append(wire)
                made += 1
            while len(wires) > FLOOD:
                wires.pop(0).close()
            over.wait(0.01)
        for wire in wires:
            wire.close()

    flooding = threading.Thread(target=keep)
    flooding.start()
    try:
        until(lambda: made >= FLOOD)
        yield lambda: made
    finally:
        over.set()
        flooding.join()


@pytest.mark.parametrize("source", ["127.0.0.2", "127.0.0.1"])
def test_a_flood_that_asks_for_nothing(site: Site, server: Server, source: str) -> None:
    """With 2,600 idle or half-open requests from one address, and more all the time, each authentic message is answered
    200 as fast as without them, from another address or from the same.
    """
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * FLOOD:
        pytest.skip("too few descriptors")
    alone = p99(site, server, source)
    with flooded(server) as made:
        before = made()
        meanwhile = p99(site, server, source)
        assert made() > before
    print(f"{source}: p99 {alone * 1000:.0f} ms alone, {meanwhile * 1000:.0f} ms with {made()} connections")
    assert meanwhile < 0.25 + alone  # a quarter of a second, on a machine that does nothing else


def p99(site: Site, server: Server, source: str) -> float:
    """Seconds until each valid message is answered, on a new connection each."""
    waited = []
    for _ in range(MESSAGES):
        data = sent(site)
        began = time.monotonic()
        with Wire(server.port, timeout=30, source=source) as wire:
            assert wire.send(data).answer().status == 200
        waited.append(time.monotonic() - began)
    return statistics.quantiles(waited, n=100)[98]
