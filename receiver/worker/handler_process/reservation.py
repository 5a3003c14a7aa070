"""Lane reservations: the leases of a run, shared by the thread that runs the lanes and the one that renews leases."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from receiver.storage.queue.leases import Lease
from receiver.worker.handler_process.child import HandlerProcess
from receiver.worker.handler_process.ipc import LeaseUntil, LeaveLane


@dataclass(kw_only=True, slots=True)
class LaneReservation:
    """Lanes that this process holds until `until` (monotonic) unless renewed, in the order in which they are run.

    `leave_by`: when their run must end, because the process stops.
    """

    leases: list[Lease]
    until: float
    leave_by: float | None = None
    process: HandlerProcess | None = field(default=None, repr=False)

    @property
    def lease(self) -> Lease:
        """The first or only lease."""
        return self.leases[0]

    def renewed(self, until: float) -> None:
        """The leases are renewed."""
        self.until = until
        self._tell(LeaseUntil(until=until))

    def leave(self, by: float) -> None:
        """End the run after the current handler, at the latest at `by` (monotonic)."""
        self.leave_by = by
        self._tell(LeaveLane())

    def _tell(self, message: LeaseUntil | LeaveLane) -> None:
        if (process := self.process) is not None:
            with suppress(OSError):  # the thread that waits for the process notices it
                process.tell(message)
