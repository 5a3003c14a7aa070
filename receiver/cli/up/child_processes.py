"""The child processes of `up`: started, started again when they end, and stopped in order.

May not know what a child does. Each child leads a session of its own, so that a Ctrl-C at the terminal reaches `up`
alone, and whatever is left of a child's group goes when the child has gone. Should `up` be killed, the kernel tells its
children to stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

log: Final = structlog.get_logger(__name__)

# Before a child that ended is started again: doubled each time, up to the longest, forgotten once it lived a minute.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
STEADY: Final = 60.0

# How often everybody is looked at.
POLL_INTERVAL: Final = 0.1

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a child is: its name in the log, its command, and the file descriptors that it inherits.

    `patience`: seconds that it may take to end when it is told to.
    """

    name: str
    command: Sequence[str]
    descriptors: Sequence[int] = ()
    patience: float


class Child:
    """A part that is kept running. Of one thread, the main one: the kernel watches the thread that started a child."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = FIRST_PAUSE
        self._due = 0.0
        self._renewing = False

    def start(self) -> None:
        """Start it. Its standard output is our standard error: ours says `ready`, and nothing else."""
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # died before we asked
                os._exit(1)

        self._process = subprocess.Popen(
            self.part.command,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=self.part.descriptors,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        self._started = time.monotonic()
        log.info("up.child_started", part=self.part.name, child=self._process.pid)

    @property
    def pid(self) -> int | None:
        """Its process id, None while it does not run."""
        return None if self._process is None else self._process.pid

    def ended(self) -> int | None:
        """The exit status of a child that has just ended, negative for a signal; None when there is no news."""
        process = self._process
        if process is None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # Not reaped yet, so its number is still its own, and its group's.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._process = None
        return process.wait()

    def keep(self) -> None:
        """Start it again when it has ended, after a pause that grows while it does not live long."""
        status = self.ended()
        now = time.monotonic()
        if status is not None and self._renewing:
            self._renewing = False
            self.start()
        elif status is not None:
            if now - self._started > STEADY:
                self._pause = FIRST_PAUSE
            log.error("up.child_ended", part=self.part.name, status=status, again_in=self._pause)
            self._due = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._process is None and now >= self._due:
            self.start()

    def renew(self) -> None:
        """Have it end in order; `keep` starts it again at once, with the settings as they are then."""
        if self._process is not None:
            self._renewing = True
            self.signal(signal.SIGTERM)

    def signal(self, order: signal.Signals, *, group: bool = False) -> None:
        """Send it a signal; with `group` to all of its group as well."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if group else os.kill)(self._process.pid, order)


def stop(children: Sequence[Child], *, hurried: Callable[[], bool]) -> None:
    """Tell children to end, and wait until they have. Those whose patience ends, or all once `hurried`, are killed."""
    began = time.monotonic()
    left = [child for child in children if child.pid is not None]
    for child in left:
        child.signal(signal.SIGTERM)
    while left:
        for child in left:
            if hurried() or time.monotonic() - began > child.part.patience:
                log.warning("up.child_killed", part=child.part.name, child=child.pid)
                child.signal(signal.SIGKILL, group=True)
        left = [child for child in left if child.ended() is None]
        time.sleep(POLL_INTERVAL if left else 0)
