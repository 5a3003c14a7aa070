"""Rows of deliveries and lanes for the tests of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from receiver.storage.queue import leases
from receiver.storage.queue.leases import Lease

LANE = "h/lab/source:s1"


@dataclass
class Rows:
    """Inserts deliveries directly. Two connections stand for two hosts."""

    connection: Connection
    other: Connection

    def add(self, lane: str = LANE, count: int = 1, *, inline: bool = False, size: int = 10) -> list[int]:
        """Insert messages with a delivery each. Returns the deliveries' ids."""
        return list(
            self.connection.execute(
                text("""
            WITH m AS (INSERT INTO messages (uuid, destination_id, credential_ids, query, test, kind, received_at, peer,
                                             digest, size, state, id_conflict, mac, mac_key)
                       SELECT gen_random_uuid(), 1, '{}', false, false, 'A.B', now(), 'p', '', :size, 'accepted', false,
                              '', '' FROM generate_series(1, :count) RETURNING id, received_at),
            p AS (INSERT INTO payloads (message_id, received_at, payload_key, sealed) SELECT id, received_at, 'k', 's'
                  FROM m)
            INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline)
            SELECT id, received_at, 1, split_part(:lane, '/', 1), :lane, :inline FROM m ORDER BY id RETURNING id"""),
                {"lane": lane, "count": count, "inline": inline, "size": size},
            ).scalars()
        )

    def one(self, query: str, **values: Any) -> Any:
        """Return the only row."""
        return self.connection.execute(text(query), values).one()

    def do(self, statement: str, **values: Any) -> None:
        """Execute a statement."""
        self.connection.execute(text(statement), values)

    def take_jobs(self) -> None:
        """Take all jobs, as Procrastinate does. Its triggers require its schema on the search path."""
        self.do("SET search_path TO procrastinate, public")
        self.do("UPDATE procrastinate_jobs SET status = 'doing'")
        self.do("RESET search_path")

    def claim(self, lane: str = LANE, owner: str = "w1", **more: Any) -> Lease:
        """Claim a lane that must be free."""
        lease = leases.claim(self.connection, lane, owner, 60, **more)
        assert lease is not None
        return lease


def many(rows: Rows, count: int, each: int = 1) -> list[str]:
    """Insert deliveries into `count` lanes. Returns the lanes' names."""
    names = [f"h/lab/source:{number:03}" for number in range(count)]
    for name in names:
        rows.add(name, each)
    return names
