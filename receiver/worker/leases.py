"""Leases of one process: claims, renews and releases lanes, even while the database is unavailable.

Must not run anything. Safe in threads. The code that runs a lane must watch the end of its lease itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.fault_injection.faults import point
from receiver.storage.queue import lanes
from receiver.storage.queue.lanes import Lease
from receiver.worker.handler_process.supervisor import LaneReservation

log: Final = structlog.get_logger(__name__)

_claiming, _claimed = point("lane.claiming"), point("lane.claimed")


class Leases:
    """The leases of one owner: a worker or receiver process."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine = engine
        self.owner: Final = owner
        self._held: dict[str, LaneReservation] = {}
        self._late: dict[Lease, None] = {}
        self._leave_by: float | None = None
        self._lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a connection in autocommit mode. Raises SQLAlchemyError."""
        with self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def claim(
        self,
        lane: str,
        seconds: float,
        *,
        inline: bool = False,
        take: Callable[[Connection, str, str, float], Lease | None] | None = None,
    ) -> LaneReservation | None:
        """Claim the lane if it is free. `take`: the claim function for a lane of the outbox. Raises SQLAlchemyError."""
        # Counted from before the statement, so that the lease ends here no later than in the database.
        began = time.monotonic()
        _claiming()
        with self.connection() as connection:
            fence = (
                lanes.claim(connection, lane, self.owner, seconds, inline=inline)
                if take is None
                else take(connection, lane, self.owner, seconds)
            )
        return None if fence is None else self._holding([fence], began + seconds)

    def claim_some(self, names: Sequence[str], seconds: float) -> LaneReservation | None:
        """Claim those of the lanes that are free. All belong to one handler at one destination. Raises SQLAlchemyError."""
        began = time.monotonic()
        _claiming()
        with self.connection() as connection:
            fences = lanes.claim_some(connection, names, self.owner, seconds)
        return self._holding(fences, began + seconds) if fences else None

    def _holding(self, fences: list[Lease], until: float) -> LaneReservation:
        _claimed()
        lease = LaneReservation(leases=fences, until=until, leave_by=self._leave_by)
        with self._lock:
            self._held.update({fence.lane: lease for fence in fences})
        return lease

    def give_back(self, lease: LaneReservation, *, released: str | None = None) -> None:
        """Release the lanes. `released`: the lane that the database has already released."""
        self._release(lease, [fence for fence in lease.leases if fence.lane != released], lease.leases)

    def give_back_after(self, lease: LaneReservation, lane: str) -> bool:
        """Release the lanes after this one, so that other slots can run them. Returns True if there are any.

        The handler process notices the lost leases itself.
        """
        place = next(n for n, fence in enumerate(lease.leases) if fence.lane == lane)
        kept, rest = lease.leases[: place + 1], lease.leases[place + 1 :]
        self._release(lease, rest, rest)
        with self._lock:
            lease.leases = kept
        return bool(rest)

    def _release(self, lease: LaneReservation, late: Sequence[Lease], gone: Sequence[Lease]) -> None:
        with self._lock:
            for fence in gone:
                if self._held.get(fence.lane) is lease:
                    del self._held[fence.lane]
            self._late.update(dict.fromkeys(late))
        if late:
            self.release()

    def release(self) -> None:
        """Write pending releases to the database, as far as it answers."""
        with self._lock:
            late = list(self._late)
        if not late:
            return
        try:
            with self.connection() as connection:
                lanes.release(connection, *late)
            with self._lock:
                for fence in late:
                    self._late.pop(fence, None)
        except SQLAlchemyError as exc:
            log.warning("leases.not_released", error=describe(exc), lanes=len(late))

    def renew(self, seconds: float) -> None:
        """Renew all leases for `seconds` from now."""
        with self._lock:
            held = [(lease, list(lease.leases)) for lease in {id(each): each for each in self._held.values()}.values()]
        if not held:
            return
        began = time.monotonic()
        try:
            with self.connection() as connection:
                kept = lanes.renew(
                    connection, self.owner, {fence.lane: fence.epoch for _, fences in held for fence in fences}, seconds
                )
                locked = [(lease, [fence for fence in fences if fence.lane not in kept]) for lease, fences in held]
                for lease in (lease for lease, missing in locked if not missing):
                    lease.renewed(began + seconds)
                for lease, missing in locked:
                    # If one lane of several is lost, end the run of all: this side does not know which one runs at that
                    # moment.
                    if missing and all(lanes.renew_one(connection, fence, seconds) for fence in missing):
                        lease.renewed(began + seconds)
        except SQLAlchemyError as exc:
            log.warning("leases.not_renewed", error=describe(exc), lanes=len(held))

    def leave(self, by: float) -> None:
        """End every current and future run after its current handler, at the latest at `by` (monotonic)."""
        self._leave_by = by
        with self._lock:
            held = {id(lease): lease for lease in self._held.values()}
        for lease in held.values():
            lease.leave(by)
