"""The supervisor of handler processes: starts them, sends commands, enforces timeouts, and kills them.

Must not touch the database or record the outcome of a run: it returns LaneDone, Killed or an answer.
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
from receiver.storage.queue.leases import Lease
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

_commanded = point("lane.commanded")

# Seconds for a process to start and to import its plugins, which may be slow.
START_TIMEOUT: Final = 60.0
# Seconds after the handler has ended, in which its outcome is recorded by a database that may be slow.
RECORD_TIMEOUT: Final = 30.0
# Seconds for a process to read a message.
_SEND_TIMEOUT: Final = 10.0
# Seconds until changes from other threads (a renewed lease, a stop request) are noticed.
_POLL_INTERVAL: Final = 0.5
# Seconds. If a handler runs longer than this, the later lanes are given to other slots.
SLOW: Final = 0.25
# The largest frame, in bytes: an answer and its envelope.
_LARGEST: Final = 64 * 1024 * 1024


Why = Literal["timed_out", "crashed", "stopped", "fenced"]


class HandlerProcessGone(ReceiverError):
    """The handler process ended by itself, or violated the protocol."""


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


class HandlerProcess:
    """One handler process, in its own session. For one thread, except `tell`."""

    def __init__(self, init: Init) -> None:
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
        self._init = init
        self.handler = self.destination = ""  # what is run, for the log

    @property
    def pid(self) -> int:
        """The process id. It is also the id of the process group."""
        return self._process.pid

    def start(self) -> None:
        """Wait until the process is ready.

        Raises ConfigurationError if it cannot load a handler, HandlerProcessGone if it does not start.
        """
        self._send(self._init)
        message = self.receive(time.monotonic() + START_TIMEOUT)
        if isinstance(message, Failed):
            raise _failed(message)
        if not isinstance(message, Ready):
            raise HandlerProcessGone("the handler process did not start")

    def tell(self, message: ToChild) -> None:
        """Send a message. Raises OSError if the process does not read it."""
        self._channel.send(message)

    def command(self, message: RunLanes | RunResponder) -> None:
        """Send a command. Raises HandlerProcessGone."""
        self.handler, self.destination = message.handler, message.destination
        self._send(message)

    def _send(self, message: ToChild) -> None:
        try:
            self._channel.send(message)
        except OSError as exc:
            raise HandlerProcessGone("the handler process does not read its messages") from exc

    def receive(self, deadline: float) -> Any:
        """Return the next message, or None at the deadline. Log lines are written to the log. Raises
        HandlerProcessGone.
        """
        while True:
            try:
                message = self._channel.receive(FromChild, deadline, self._end)
            except (EOFError, ProtocolViolation) as exc:
                raise HandlerProcessGone from exc
            if isinstance(message, Log):
                level = message.level if message.level in ("debug", "info", "warning") else "error"
                dropped = {"dropped": message.dropped} if message.dropped else {}
                named = {"dropped_fields": list(message.names)} if message.names else {}
                getattr(plugin_log, level)(message.event, **(message.fields | dropped | named))
            elif isinstance(message, Unsuccessful):
                log_attempt(message, self.handler, self.destination)
            elif message is not None or time.monotonic() >= deadline:
                return message
            else:
                raise HandlerProcessGone

    def stack(self) -> tuple[str, ...]:
        """Return the frames of the running handler as module:line:function, outermost first."""
        return hang.frames(self._process.pid, self._stack, self._init.path)

    def kill(self) -> str:
        """Kill the process and its group. Returns how it ended, as one word."""
        # The process is not reaped yet, so its id and its group's id cannot have been reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._channel.close()
        os.close(self._end)
        os.close(self._stack)
        return signal.Signals(-status).name if status < 0 else f"Exit{status}"

    def ended(self) -> bool:
        """Return True if the process has ended by itself."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


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
                    self._replace(message.must_recycle)
                    return message
                elif isinstance(message, Failed):
                    raise _failed(message)
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
                elif isinstance(message, Failed):
                    raise _failed(message)
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


def log_attempt(message: Unsuccessful, handler: str, destination: str) -> None:
    """Log an attempt that did not succeed."""
    details = {"sqlstate": message.sqlstate, "error": message.shown, "again_in": message.pause}
    line = {name: value for name, value in details.items() if value is not None}
    fields: dict[str, Any] = {
        "handler": handler,
        "destination": destination,
        "lane": message.lane,
        "delivery": message.delivery,
        "attempt": message.attempt,
        "outcome": message.outcome,
        "error_class": message.error_class,
        "frames": list(message.frames),
        **line,
    }
    if message.state == "dead":
        delivery_log.error("delivery.dead", **fields)
    elif message.outcome == "retry_later":
        delivery_log.info("delivery.deferred", **fields)
    else:
        delivery_log.warning("delivery.failed", **fields)


def _failed(message: Failed) -> ConfigurationError:
    if not message.error_class:
        return ConfigurationError(message.error)
    return PluginError(
        LoadFailure(
            handler=None,
            origin="",
            error_class=message.error_class,
            place=message.place,
            summary=message.error,
            message=message.error,
        )
    )


def _over(lease: LaneReservation, deadline: float) -> Why | None:
    """Return why the run must end now, or None."""
    now = time.monotonic()
    if now >= lease.until:
        return "fenced"
    if now >= deadline:
        return "timed_out"
    return "stopped" if lease.leave_by is not None and now >= lease.leave_by else None
