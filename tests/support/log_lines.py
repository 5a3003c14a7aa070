"""What a process prints that configures its logs as the receiver's processes do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PREAMBLE = """
import logging, structlog, sys, threading, warnings
from receiver import logs
logs.configure("info")
log = structlog.get_logger("receiver.test")
"""


def printed(source: str, *, status: int = 0) -> list[dict[str, Any]]:
    """The lines that a process prints which configures its logs and runs `source`."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + source], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.isascii()
    return [json.loads(line) for line in done.stderr.splitlines()]
