"""End what tests and benchmarks have started, and see that it has ended."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import psutil


def end(process: subprocess.Popen[Any], seconds: float) -> None:
    """Send SIGTERM, and SIGKILL after `seconds`; kill the child processes that it leaves behind."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def gone(process: psutil.Process | int) -> bool:
    """Return whether a process, or the one with this id, has ended. A zombie has."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return not found.is_running() or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
