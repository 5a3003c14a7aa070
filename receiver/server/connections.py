"""The connection table of a worker process: deadlines, and which connection to close when there are too many.

A connection costs a file descriptor. Clients that hold connections without sending a request must not keep others out.
While a connection has no complete request head, it counts against its network (an IPv4 address, or an IPv6 /64), and a
network may have a quarter of all connections at most. When all are taken, the network with the most loses its oldest.
A connection with a request at work is never closed.

Must not parse or answer anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Protocol

# Seconds between two checks of all deadlines.
LOOK_INTERVAL = 0.5
# One network may have 1/SHARE of all connections without a complete head.
SHARE = 4


class Pool(IntEnum):
    """The state of a connection, by how well it can be spared: the first pool that is not empty loses one."""

    LINGERING = 0  # replied; read until the client has received the reply
    WAITING = 1  # no complete request head
    IDLE = 2  # between two requests
    BODY = 3  # a body is arriving that is not authenticated
    AUTHENTICATED_BODY = 4
    AT_WORK = 5  # never closed


class Tracked(Protocol):
    """A connection in the table."""

    network: str
    pool: Pool
    dropped: bool  # closed by the table and removed from it

    def look(self, now: float) -> None:
        """Close the connection if it has missed a deadline."""

    def abort(self) -> None:
        """Close the connection at once."""


class ConnectionTable:
    """All connections of an event loop, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0
        self._pools: tuple[dict[str, dict[Tracked, None]], ...] = tuple({} for _ in Pool)
        self._looking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tracked]:
        for pool in self._pools:
            for connections in pool.values():
                yield from connections

    def add(self, connection: Tracked, loop: asyncio.AbstractEventLoop) -> bool:
        """Add a connection; close another if the table is full. Return False if all have requests at work."""
        has_place = self._count < self.limit or self._evict()
        self._count += 1
        self._insert(connection)
        if self._looking is None:
            self._looking = loop.call_later(LOOK_INTERVAL, self._look, loop)
        return has_place

    def remove(self, connection: Tracked) -> None:
        """Remove a connection, which is closed."""
        if not connection.dropped:
            self._count -= 1
            self._take_out(connection)

    def move(self, connection: Tracked, pool: Pool) -> None:
        """Move a connection to another pool."""
        if pool is not connection.pool and not connection.dropped:
            self._take_out(connection)
            connection.pool = pool
            self._insert(connection)

    def _insert(self, connection: Tracked) -> None:
        pool = self._pools[connection.pool]
        connections = pool.get(connection.network)
        if connections is None:
            connections = pool[connection.network] = {}
        connections[connection] = None
        if connection.pool is Pool.WAITING and len(connections) > max(1, self.limit // SHARE):
            self._drop(next(iter(connections)))

    def _drop(self, connection: Tracked) -> None:
        self.remove(connection)
        connection.dropped = True
        connection.abort()

    def _take_out(self, connection: Tracked) -> None:
        pool = self._pools[connection.pool]
        connections = pool[connection.network]
        del connections[connection]
        if not connections:
            del pool[connection.network]

    def _evict(self) -> bool:
        pool = next((pool for pool in self._pools[: Pool.AT_WORK] if pool), None)
        if pool is None:
            return False
        most = max(pool, key=lambda network: len(pool[network]))
        self._drop(next(iter(pool[most])))
        return True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for connection in list(self):
            connection.look(now)
        self._looking = loop.call_later(LOOK_INTERVAL, self._look, loop) if self._count else None


@lru_cache(1024)
def network_of(address: str) -> str:
    """Return the network that an address counts against: itself, or its /64."""
    if ":" not in address:
        return address
    try:
        found = IPv6Address(address.partition("%")[0])
    except AddressValueError:
        return address
    return str(found.ipv4_mapped or found.packed[:8].hex())
