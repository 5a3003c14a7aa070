"""Supervisor of the child processes of `up`: starts them, restarts them after they exit, and stops them.

Each child leads its own session: a Ctrl-C at the terminal reaches only `up`. After a child exits, the rest of its
process group is killed. If `up` is killed, the kernel sends its children SIGTERM.

Must not know what a child does.
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

# Seconds before a child is restarted: doubled each time up to the maximum, and reset after it ran for STEADY seconds.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
STEADY: Final = 60.0

# Seconds between two checks of the children.
POLL_INTERVAL: Final = 0.1

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """The definition of a child: its name in the log, its command, and the file descriptors that it inherits.

    `timeout`: seconds from SIGTERM to SIGKILL.
    """

    name: str
    command: Sequence[str]
    descriptors: Sequence[int] = ()
    timeout: float


class Child:
    """A supervised child process. For the main thread only: the kernel's death signal follows the starting thread."""

    def __init__(self, part: ChildSpec) -> None:
        self.part = part
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = FIRST_PAUSE
        self._due = 0.0
        self._renewing = False

    def start(self) -> None:
        """Start the process. Its stdout goes to our stderr, because our stdout is only for the `ready` line."""
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # `up` died before the call
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
        """The process id; None while the process does not run."""
        return None if self._process is None else self._process.pid

    def ended(self) -> int | None:
        """The exit status if the process has ended since the last call, negative for a signal; otherwise None."""
        process = self._process
        if process is None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # Not reaped yet: its process id, and that of its group, cannot be reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._process = None
        return process.wait()

    def keep(self) -> None:
        """Restart the process after it has ended. The pause before that grows while the process exits early."""
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
        """Stop the process. `keep` then restarts it without a pause, with the current settings."""
        if self._process is not None:
            self._renewing = True
            self.signal(signal.SIGTERM)

    def signal(self, order: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process, or to its whole process group with `group`."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if group else os.kill)(self._process.pid, order)


def stop(children: Sequence[Child], *, hurried: Callable[[], bool]) -> None:
    """Send SIGTERM to the children and wait for them. Kill a child after its timeout, or all once `hurried` is true."""
    began = time.monotonic()
    left = [child for child in children if child.pid is not None]
    for child in left:
        child.signal(signal.SIGTERM)
    while left:
        for child in left:
            if hurried() or time.monotonic() - began > child.part.timeout:
                log.warning("up.child_killed", part=child.part.name, child=child.pid)
                child.signal(signal.SIGKILL, group=True)
        left = [child for child in left if child.ended() is None]
        time.sleep(POLL_INTERVAL if left else 0)
