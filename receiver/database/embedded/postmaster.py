"""Recognize the cluster's processes, and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 60.0  # seconds: a fast shutdown writes a checkpoint first
KILL_TIMEOUT = 15.0  # seconds


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Wait until `holds`. Returns False when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def works_in(pid: int, directory: Path) -> bool:
    """Return whether the process has that working directory."""
    try:
        return Path(f"/proc/{pid}/cwd").samefile(directory)
    except OSError:  # gone, a zombie, or another user's
        return False


def is_postgres(pid: int, directory: Path) -> bool:
    """Return whether the process is the cluster's. A postmaster works in its directory; an id may be reused."""
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8", "replace") == "postgres\n" and works_in(pid, directory)
    except OSError:
        return False
