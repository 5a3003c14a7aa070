"""Ending what tests and benchmarks have started."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import psutil


def end(process: subprocess.Popen[Any], seconds: float) -> None:
    """Ask it to end, and make it after `seconds`; what it had started and left behind is killed."""
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
