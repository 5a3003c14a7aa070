"""Tiles: the stored hashes of the audit's Merkle tree, 256 of one level in a row (as in c2sp.org/tlog-tiles).

Tiles of level L hold the hashes of complete subtrees of 256**L leaves. The hashes between two levels are computed.

Must not know what a leaf is. Nothing here is trusted: verification computes the roots from the leaves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection

from receiver.transparency.merkle import HASH_BYTES, Frontier, node_hash

HEIGHT: Final = 8
WIDTH: Final = 1 << HEIGHT
# How many tiles of 8 KB are kept in memory.
_KEPT: Final = 512

_READ: Final = "SELECT hashes FROM audit_tiles WHERE level = %(level)s AND number = %(number)s"
_WRITE: Final = """
INSERT INTO audit_tiles (level, number, hashes) VALUES (%(level)s, %(number)s, %(hashes)s)
ON CONFLICT (level, number) DO UPDATE SET hashes = excluded.hashes"""


class TileStore:
    """Reads and writes the tiles of one database through one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tiles: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def subtree(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree, as receiver.transparency.merkle asks. Raises KeyError."""
        stored, rest = divmod(level, HEIGHT)
        number, place = divmod(index << rest, WIDTH)
        tile = self._tile(stored, number)
        hashes = [tile[at * HASH_BYTES : (at + 1) * HASH_BYTES] for at in range(place, place + (1 << rest))]
        if len(hashes[-1]) != HASH_BYTES:
            raise KeyError((level, index))
        while len(hashes) > 1:
            hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
        return hashes[0]

    def frontier(self, size: int) -> Frontier:
        """Return the right edge of the tree of `size` leaves. Raises KeyError."""
        hashes, begin = [], 0
        for level in reversed(range(size.bit_length())):
            if size >> level & 1:
                hashes.append(self.subtree(level, begin >> level))
                begin += 1 << level
        return Frontier(size, hashes)

    def write(self, completed: Iterable[tuple[int, int, bytes]]) -> None:
        """Write the subtrees that `Frontier.append` completed, in that order."""
        changed: dict[tuple[int, int], bytearray] = {}
        for level, index, value in completed:
            stored, rest = divmod(level, HEIGHT)
            if rest:
                continue
            number, place = divmod(index, WIDTH)
            tile = changed.get((stored, number))
            if tile is None:
                before = self._tile(stored, number) if place else b""
                tile = changed[stored, number] = bytearray(before[: place * HASH_BYTES])
            assert len(tile) == place * HASH_BYTES
            tile += value
        for (level, number), tile in changed.items():
            self._tiles.pop((level, number), None)
            self._connection.exec_driver_sql(_WRITE, {"level": level, "number": number, "hashes": bytes(tile)})

    def _tile(self, level: int, number: int) -> bytes:
        found = self._tiles.get((level, number))
        if found is None:
            row = self._connection.exec_driver_sql(_READ, {"level": level, "number": number}).one_or_none()
            if row is None:
                raise KeyError((level, number))
            found = self._tiles[level, number] = bytes(row.hashes)
            if len(self._tiles) > _KEPT:
                self._tiles.popitem(last=False)
        return found
