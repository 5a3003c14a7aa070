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
from receiver.storage.queue import leases as lease_rows
from receiver.storage.queue.leases import Lease
from receiver.worker.handler_process.reservation import LaneReservation

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
            lease = (
                lease_rows.claim(connection, lane, self.owner, seconds, inline=inline)
                if take is None
                else take(connection, lane, self.owner, seconds)
            )
        return None if lease is None else self._holding([lease], began + seconds)

    def claim_some(self, names: Sequence[str], seconds: float) -> LaneReservation | None:
        """Claim the free ones of these lanes, which belong to a handler at one destination. Raises SQLAlchemyError."""
        began = time.monotonic()
        _claiming()
        with self.connection() as connection:
            leases = lease_rows.claim_some(connection, names, self.owner, seconds)
        return self._holding(leases, began + seconds) if leases else None

    def _holding(self, leases: list[Lease], until: float) -> LaneReservation:
        _claimed()
        reservation = LaneReservation(leases=leases, until=until, leave_by=self._leave_by)
        with self._lock:
            self._held.update({lease.lane: reservation for lease in leases})
        return reservation

    def give_back(self, reservation: LaneReservation, *, released: str | None = None) -> None:
        """Release the lanes. `released`: the lane that the database has already released."""
        self._release(
            reservation, [lease for lease in reservation.leases if lease.lane != released], reservation.leases
        )

    def give_back_after(self, reservation: LaneReservation, lane: str) -> bool:
        """Release the lanes after this one, so that other slots can run them. Returns True if there are any.

        The handler process notices the lost leases itself.
        """
        place = next(n for n, lease in enumerate(reservation.leases) if lease.lane == lane)
        kept, rest = reservation.leases[: place + 1], reservation.leases[place + 1 :]
        self._release(reservation, rest, rest)
        with self._lock:
            reservation.leases = kept
        return bool(rest)

    def _release(self, reservation: LaneReservation, late: Sequence[Lease], gone: Sequence[Lease]) -> None:
        with self._lock:
            for lease in gone:
                if self._held.get(lease.lane) is reservation:
                    del self._held[lease.lane]
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
                lease_rows.release(connection, *late)
            with self._lock:
                for lease in late:
                    self._late.pop(lease, None)
        except SQLAlchemyError as exc:
            log.warning("leases.not_released", error=describe(exc), lanes=len(late))

    def renew(self, seconds: float) -> None:
        """Renew all leases for `seconds` from now."""
        with self._lock:
            held = [
                (reservation, list(reservation.leases))
                for reservation in {id(each): each for each in self._held.values()}.values()
            ]
        if not held:
            return
        began = time.monotonic()
        try:
            with self.connection() as connection:
                kept = lease_rows.renew(
                    connection, self.owner, {lease.lane: lease.epoch for _, leases in held for lease in leases}, seconds
                )
                locked = [
                    (reservation, [lease for lease in leases if lease.lane not in kept]) for reservation, leases in held
                ]
                for reservation in (reservation for reservation, missing in locked if not missing):
                    reservation.renewed(began + seconds)
                for reservation, missing in locked:
                    # If one lane of several is lost, end the run of all: this side does not know which one runs at that
                    # moment.
                    if missing and all(lease_rows.renew_one(connection, lease, seconds) for lease in missing):
                        reservation.renewed(began + seconds)
        except SQLAlchemyError as exc:
            log.warning("leases.not_renewed", error=describe(exc), lanes=len(held))

    def leave(self, by: float) -> None:
        """End every current and future run after its current handler, at the latest at `by` (monotonic)."""
        self._leave_by = by
        with self._lock:
            held = {id(reservation): reservation for reservation in self._held.values()}
        for reservation in held.values():
            reservation.leave(by)
