"""Handler processes as whoever starts them sees them: started, told what to run, timed, and killed.

May not touch the database, nor record what became of a run: `Left`, `Cut` or an answer comes out.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import structlog

from receiver.errors import ConfigurationError, ReceiverError
from receiver.fault_injection.faults import point
from receiver.storage.queue.lanes import Lease
from receiver.worker.discovery import LoadFailure, PluginError
from receiver.worker.handler_process import hang
from receiver.worker.handler_process.ipc import (
    Channel,
    Ended,
    Failed,
    FromChild,
    Init,
    LaneDone,
    LeaseUntil,
    LeaveLane,
    Log,
    ProtocolViolation,
    Ready,
    ResponderAnswer,
    ResponderError,
    RunLanes,
    RunResponder,
    Started,
    ToChild,
    Unsuccessful,
)

plugin_log: Final = structlog.get_logger("receiver.plugin")
delivery_log: Final = structlog.get_logger("receiver.delivery")

_commanded = point("lane.told")

# A process has to start, and to import what it runs, within this time; plugins may be slow to import.
START_TIMEOUT: Final = 60.0
# What follows the handler: its outcome is recorded, by a database that may be slow.
RECORD_TIMEOUT: Final = 30.0
# A process that does not read what it is told.
_SEND_TIMEOUT: Final = 10.0
# How long news from other threads (a lease renewed, an order to stop) may wait.
_POLL_INTERVAL: Final = 0.5
# A handler that runs for so long keeps the lanes that come after it waiting: they are given to others.
SLOW: Final = 0.25
# The largest frame: an answer, and what stands around it.
_LARGEST: Final = 64 * 1024 * 1024


Why = Literal["timed_out", "crashed", "stopped", "fenced"]


class HandlerProcessGone(ReceiverError):
    """The handler process ended by itself, or speaks nonsense."""


@dataclass(kw_only=True, slots=True)
class LaneReservation:
    """Lanes that are ours until `until` (monotonic), as long as they are renewed; in the order in which they are run.
    `leave_by`: when their run must be over, for the process stops.
    """

    leases: list[Lease]
    until: float
    leave_by: float | None = None
    process: HandlerProcess | None = field(default=None, repr=False)

    @property
    def lease(self) -> Lease:
        """The first, or only, one."""
        return self.leases[0]

    def renewed(self, until: float) -> None:
        """They are ours for longer."""
        self.until = until
        self._tell(LeaseUntil(until=until))

    def leave(self, by: float) -> None:
        """Their run is to end: after the handler that runs now, and by then."""
        self.leave_by = by
        self._tell(LeaveLane())

    def _tell(self, said: LeaseUntil | LeaveLane) -> None:
        if (process := self.process) is not None:
            with suppress(OSError):  # the thread that waits for it finds out
                process.tell(said)


@dataclass(frozen=True, kw_only=True, slots=True)
class Killed:
    """A run that was ended from outside, or ended the process. `delivery` is 0 when no handler ran.

    `frames`: where it stood when its time was over. `why`: "timed_out" · "crashed" · "stopped": we were told to stop ·
    "fenced": the lease is over.
    """

    why: Why
    error_class: str
    lane: str = ""
    delivery: int = 0
    attempt: int = 0
    deferred_for: float = 0.0
    frames: tuple[str, ...] = ()


class HandlerProcess:
    """One handler process, in a session of its own. Of one thread, but for `tell`."""

    def __init__(self, hello: Init) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_TIMEOUT)
        self._stack = hang.new_file()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "receiver.worker.handler_process", str(theirs.fileno()), str(self._stack)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._stack],
                start_new_session=True,
            )
        self._end = os.pidfd_open(self._process.pid)
        self._channel = Channel(ours, _LARGEST)
        self._hello = hello
        self.handler = self.destination = ""  # what it runs, for the log

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self._process.pid

    def start(self) -> None:
        """Wait until it is ready. Raises ConfigurationError when it cannot load a handler, Gone."""
        self._say(self._hello)
        said = self.hear(time.monotonic() + START_TIMEOUT)
        if isinstance(said, Failed):
            raise _failed(said)
        if not isinstance(said, Ready):
            raise HandlerProcessGone("the handler process does not start")

    def tell(self, said: ToChild) -> None:
        """Say something. Raises OSError when it does not listen."""
        self._channel.send(said)

    def command(self, said: RunLanes | RunResponder) -> None:
        """Tell it what to do. Raises Gone."""
        self.handler, self.destination = said.handler, said.destination
        self._say(said)

    def _say(self, said: ToChild) -> None:
        try:
            self._channel.send(said)
        except OSError as exc:
            raise HandlerProcessGone("the handler process does not listen") from exc

    def hear(self, deadline: float) -> Any:
        """What it says next, None at the deadline. Log lines are passed on. Raises Gone."""
        while True:
            try:
                said = self._channel.receive(FromChild, deadline, self._end)
            except (EOFError, ProtocolViolation) as exc:
                raise HandlerProcessGone from exc
            if isinstance(said, Log):
                level = said.level if said.level in ("debug", "info", "warning") else "error"
                dropped = {"dropped": said.dropped} if said.dropped else {}
                named = {"dropped_fields": list(said.names)} if said.names else {}
                getattr(plugin_log, level)(said.event, **(said.fields | dropped | named))
            elif isinstance(said, Unsuccessful):
                log_attempt(said, self.handler, self.destination)
            elif said is not None or time.monotonic() >= deadline:
                return said
            else:
                raise HandlerProcessGone

    def where(self) -> tuple[str, ...]:
        """The frames of the handler that runs: module:line:function, outermost first."""
        return hang.frames(self._process.pid, self._stack, self._hello.path)

    def kill(self) -> str:
        """End it and its group; how it ended, as a word."""
        # Not reaped yet, so that its number is still its own and its group's.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._channel.close()
        os.close(self._end)
        os.close(self._stack)
        return signal.Signals(-status).name if status < 0 else f"Exit{status}"

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class HandlerSlot:
    """A place for one handler process, kept warm from run to run. Of one thread at a time."""

    def __init__(self, hello: Callable[[], Init]) -> None:
        self._hello = hello
        self._process: HandlerProcess | None = None

    def warm(self) -> HandlerProcess:
        """The process, started when there is none. Raises ConfigurationError, Gone."""
        if self._process is not None and self._process.ended():
            self.close()
        if self._process is None:
            self._process = HandlerProcess(self._hello())
            try:
                self._process.start()
            except ReceiverError:
                self.close()
                raise
        return self._process

    def close(self) -> str:
        """End the process, if there is one; how it ended."""
        process, self._process = self._process, None
        return "" if process is None else process.kill()

    def run_lanes(self, command: RunLanes, lease: LaneReservation, slow: Callable[[str], None]) -> LaneDone | Killed:
        """Run the lanes as long as they are ours. `slow` is told the lane in which a handler keeps the others waiting.

        Raises ConfigurationError when the handler cannot be loaded, Gone when no process starts.
        """
        process = lease.process = self.warm()
        running = Started()
        deadline = time.monotonic() + START_TIMEOUT
        slow_at = math.inf
        try:
            process.command(command)
            _commanded()
            if lease.leave_by is not None:  # said before there was somebody to hear it
                lease.leave(lease.leave_by)
            while (why := _over(lease, deadline)) is None:
                said = process.hear(min(deadline, lease.until, slow_at, time.monotonic() + _POLL_INTERVAL))
                if isinstance(said, Started):
                    running, deadline = said, time.monotonic() + command.timeout
                    slow_at = time.monotonic() + SLOW if len(lease.leases) > 1 else math.inf
                elif said is None and time.monotonic() >= slow_at:
                    slow_at = math.inf
                    slow(running.lane)
                elif isinstance(said, Ended):
                    deadline = time.monotonic() + RECORD_TIMEOUT
                elif isinstance(said, LaneDone):
                    self._replace(said.must_recycle)
                    return said
                elif isinstance(said, Failed):
                    raise _failed(said)
                elif said is not None:
                    raise HandlerProcessGone
        except HandlerProcessGone:
            # It keeps the time of its lease itself.
            why = _over(lease, math.inf) or ("crashed" if lease.leave_by is None else "stopped")
        finally:
            lease.process = None
        return self._killed(why, running)

    def ask(self, question: RunResponder, deadline: float) -> ResponderAnswer | ResponderError | Killed:
        """Have a query answered by `deadline` (monotonic). Raises ConfigurationError when the responder cannot be
        loaded, Gone when no process starts.
        """
        process = self.warm()
        if time.monotonic() >= deadline:  # the process was late, not the responder
            return Killed(why="timed_out", error_class="TimedOut")
        try:
            process.command(question)
            while (said := process.hear(deadline)) is not None:
                if isinstance(said, Started):
                    deadline = min(deadline, time.monotonic() + question.timeout)
                elif isinstance(said, Failed):
                    raise _failed(said)
                elif isinstance(said, ResponderAnswer | ResponderError):
                    self._replace(said.must_recycle)
                    return said
        except HandlerProcessGone:
            return self._killed("crashed", Started())
        return self._killed("timed_out", Started())

    def _replace(self, worn: bool) -> None:
        if worn:
            self.close()

    def _killed(self, why: Why, running: Started) -> Killed:
        # Asked first, for whoever is to correct the handler: where does it hang?
        frames = self._process.where() if why == "timed_out" and self._process is not None else ()
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


def log_attempt(said: Unsuccessful, handler: str, destination: str) -> None:
    """The line of an attempt that did not succeed."""
    told = {"sqlstate": said.sqlstate, "error": said.shown, "again_in": said.pause}
    line = {name: value for name, value in told.items() if value is not None}
    fields: dict[str, Any] = {
        "handler": handler,
        "destination": destination,
        "lane": said.lane,
        "delivery": said.delivery,
        "attempt": said.attempt,
        "outcome": said.outcome,
        "error_class": said.error_class,
        "frames": list(said.frames),
        **line,
    }
    if said.state == "dead":
        delivery_log.error("delivery.dead", **fields)
    elif said.outcome == "retry_later":
        delivery_log.info("delivery.deferred", **fields)
    else:
        delivery_log.warning("delivery.failed", **fields)


def _failed(said: Failed) -> ConfigurationError:
    if not said.error_class:
        return ConfigurationError(said.error)
    return PluginError(
        LoadFailure(
            handler=None,
            origin="",
            error_class=said.error_class,
            place=said.place,
            summary=said.error,
            message=said.error,
        )
    )


def _over(lease: LaneReservation, deadline: float) -> Why | None:
    """Why the run must end now, if it must."""
    now = time.monotonic()
    if now >= lease.until:
        return "fenced"
    if now >= deadline:
        return "timed_out"
    return "stopped" if lease.leave_by is not None and now >= lease.leave_by else None
