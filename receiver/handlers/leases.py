"""The lanes that this process holds: taken, kept, and given back, also when the database is away just then.

May not run anything. Safe in threads. Whoever runs a lane watches the end of its lease himself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.handlers.runner import Lease
from receiver.storage import lanes
from receiver.storage.database import describe
from receiver.storage.lanes import Fence

log: Final = structlog.get_logger(__name__)


class Leases:
    """What one owner, a worker or receiver process, holds."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine = engine
        self.owner: Final = owner
        self._held: dict[str, Lease] = {}
        self._late: dict[Fence, None] = {}
        self._leave_by: float | None = None
        self._lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection on which each statement is a transaction. Raises SQLAlchemyError."""
        with self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def claim(self, lane: str, seconds: float, *, inline: bool = False,
              take: Callable[[Connection, str, str, float], Fence | None] | None = None) -> Lease | None:
        """Take the lane, if it is to be had; `take` says how, of a lane that is no handler's. Raises SQLAlchemyError.
        """
        # Counted from before the question, so that it ends here no later than in the database.
        began = time.monotonic()
        with self.connection() as connection:
            fence = (lanes.claim(connection, lane, self.owner, seconds, inline=inline) if take is None
                     else take(connection, lane, self.owner, seconds))
        if fence is None:
            return None
        lease = Lease(fence=fence, until=began + seconds, leave_by=self._leave_by)
        with self._lock:
            self._held[lane] = lease
        return lease

    def give_back(self, lease: Lease, *, released: bool = False) -> None:
        """The lane is no longer run here. `released`: the database knows that already."""
        with self._lock:
            if self._held.get(lease.fence.lane) is lease:
                del self._held[lease.fence.lane]
            if not released:
                self._late[lease.fence] = None
        if not released:
            self.release()

    def release(self) -> None:
        """Tell the database what was given back, as far as it can be told now."""
        with self._lock:
            late = list(self._late)
        if not late:
            return
        try:
            with self.connection() as connection:
                for fence in late:
                    lanes.release(connection, fence)
                    with self._lock:
                        self._late.pop(fence, None)
        except SQLAlchemyError as exc:
            log.warning("leases.not_released", error=describe(exc), lanes=len(late))

    def renew(self, seconds: float) -> None:
        """Keep what is held for so long from now."""
        with self._lock:
            held = dict(self._held)
        if not held:
            return
        began = time.monotonic()
        try:
            with self.connection() as connection:
                kept = lanes.renew(connection, self.owner, {
                    lane: lease.fence.epoch for lane, lease in held.items()}, seconds)
                self._renewed([held[lane] for lane in kept], began + seconds)
                for lease in (held[lane] for lane in held.keys() - kept):
                    began = time.monotonic()
                    if lanes.renew_one(connection, lease.fence, seconds):
                        self._renewed([lease], began + seconds)
        except SQLAlchemyError as exc:
            log.warning("leases.not_renewed", error=describe(exc), lanes=len(held))

    def leave(self, by: float) -> None:
        """Every run, present and future, is to end: after the handler that runs then, and by that time (monotonic)."""
        self._leave_by = by
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            lease.leave(by)

    @staticmethod
    def _renewed(kept: list[Lease], until: float) -> None:
        for lease in kept:
            lease.renewed(until)
