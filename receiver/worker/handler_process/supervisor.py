"""The supervisor of handler processes: keeps one warm for each slot, sends commands, enforces timeouts and leases.

Must not touch the database or record the outcome of a run: it returns LaneDone, Killed or an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from receiver.errors import ReceiverError
from receiver.fault_injection.faults import point
from receiver.metrics import counters
from receiver.worker.handler_process.child import START_TIMEOUT, HandlerProcess, HandlerProcessGone, load_error
from receiver.worker.handler_process.ipc import (
    CannotExecute,
    Ended,
    Init,
    LaneDone,
    ResponderAnswer,
    ResponderError,
    RunLanes,
    RunResponder,
    Started,
)
from receiver.worker.handler_process.reservation import LaneReservation

_commanded = point("lane.commanded")

# Seconds after the handler has ended, in which its outcome is recorded by a database that may be slow.
RECORD_TIMEOUT: Final = 30.0
# Seconds until changes from other threads (a renewed lease, a stop request) are noticed.
_POLL_INTERVAL: Final = 0.5
# Seconds. If a handler runs longer than this, the later lanes are given to other slots.
SLOW: Final = 0.25


Why = Literal["timed_out", "crashed", "stopped", "fenced"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Killed:
    """A run that was killed, or that ended the process. `delivery` is 0 if no handler ran.

    `frames`: the handler's stack at its timeout. `why`: "timed_out" · "crashed" · "stopped" (the worker stops) ·
    "fenced" (the lease has ended).
    """

    why: Why
    error_class: str
    lane: str = ""
    delivery: int = 0
    attempt: int = 0
    deferred_for: float = 0.0
    frames: tuple[str, ...] = ()


class HandlerSlot:
    """A slot for one handler process, which stays warm between runs. For one thread at a time."""

    def __init__(self, init: Callable[[], Init]) -> None:
        self._init = init
        self._process: HandlerProcess | None = None

    def warm(self) -> HandlerProcess:
        """Return the process; start it if necessary. Raises ConfigurationError, HandlerProcessGone."""
        if self._process is not None and self._process.ended():
            self.close()
        if self._process is None:
            self._process = HandlerProcess(self._init())
            try:
                self._process.start()
            except ReceiverError:
                self.close()
                raise
        return self._process

    def close(self) -> str:
        """End the process, if there is one. Returns how it ended."""
        process, self._process = self._process, None
        return "" if process is None else process.kill()

    def run_lanes(self, command: RunLanes, lease: LaneReservation, slow: Callable[[str], None]) -> LaneDone | Killed:
        """Run the lanes while their leases last. `slow` is called with the lane whose handler delays the others.

        Raises ConfigurationError if the handler cannot be loaded, HandlerProcessGone if no process starts.
        """
        process = lease.process = self.warm()
        running = Started()
        deadline = time.monotonic() + START_TIMEOUT
        slow_at = math.inf
        try:
            process.command(command)
            _commanded()
            if lease.leave_by is not None:  # the request came before the process was attached
                lease.leave(lease.leave_by)
            while (why := _over(lease, deadline)) is None:
                message = process.receive(min(deadline, lease.until, slow_at, time.monotonic() + _POLL_INTERVAL))
                if isinstance(message, Started):
                    running, deadline = message, time.monotonic() + command.timeout
                    slow_at = time.monotonic() + SLOW if len(lease.leases) > 1 else math.inf
                elif message is None and time.monotonic() >= slow_at:
                    slow_at = math.inf
                    slow(running.lane)
                elif isinstance(message, Ended):
                    deadline = time.monotonic() + RECORD_TIMEOUT
                elif isinstance(message, LaneDone):
                    for seconds in message.succeeded:
                        counters.count_attempt(command.destination, command.handler, "succeeded", seconds)
                    self._replace(message.must_recycle)
                    return msgspec.structs.replace(message, succeeded=())
                elif isinstance(message, CannotExecute):
                    raise load_error(message)
                elif message is not None:
                    raise HandlerProcessGone
        except HandlerProcessGone:
            # The process enforces its lease itself, too.
            why = _over(lease, math.inf) or ("crashed" if lease.leave_by is None else "stopped")
        finally:
            lease.process = None
        return self._killed(why, running)

    def ask(self, question: RunResponder, deadline: float) -> ResponderAnswer | ResponderError | Killed:
        """Have a query answered by `deadline` (monotonic).

        Raises ConfigurationError if the responder cannot be loaded, HandlerProcessGone if no process starts.
        """
        process = self.warm()
        if time.monotonic() >= deadline:  # the process was late, not the responder
            return Killed(why="timed_out", error_class="TimedOut")
        try:
            process.command(question)
            while (message := process.receive(deadline)) is not None:
                if isinstance(message, Started):
                    deadline = min(deadline, time.monotonic() + question.timeout)
                elif isinstance(message, CannotExecute):
                    raise load_error(message)
                elif isinstance(message, ResponderAnswer | ResponderError):
                    self._replace(message.must_recycle)
                    return message
        except HandlerProcessGone:
            return self._killed("crashed", Started())
        return self._killed("timed_out", Started())

    def _replace(self, must_recycle: bool) -> None:
        if must_recycle:
            self.close()

    def _killed(self, why: Why, running: Started) -> Killed:
        # Read the stack before the kill: it shows the developer stack the handler hangs.
        frames = self._process.stack() if why == "timed_out" and self._process is not None else ()
        ended = self.close()
        classes = {"timed_out": "TimedOut", "crashed": ended, "stopped": "WorkerStopped", "fenced": "LeaseLost"}
        return Killed(
            why=why,
            error_class=classes[why],
            lane=running.lane,
            delivery=running.delivery,
            attempt=running.attempt,
            deferred_for=running.deferred_for,
            frames=frames,
        )


def _over(lease: LaneReservation, deadline: float) -> Why | None:
    """Return why the run must end now, or None."""
    now = time.monotonic()
    if now >= lease.until:
        return "fenced"
    if now >= deadline:
        return "timed_out"
    return "stopped" if lease.leave_by is not None and now >= lease.leave_by else None
