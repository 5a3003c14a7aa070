"""Stops and kills the worker processes of tests."""

from __future__ import annotations

import signal
import subprocess

from tests.support.processes import gone
from tests.support.waiting import until

# Seconds. A worker that is asked to stop gives handlers half a minute.
STOP_TIMEOUT = 50.0


def stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a worker in order. Returns its exit status."""
    process.send_signal(signal.SIGTERM)
    return process.wait(STOP_TIMEOUT)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker, as a power failure does."""
    process.kill()
    process.wait(30)


def until_gone(pids: list[int]) -> None:
    """Wait until these processes have ended."""
    until(lambda: all(gone(pid) for pid in pids), "no handler process is left")
