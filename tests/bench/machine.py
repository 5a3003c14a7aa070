"""What processes take of the machine, as /proc tells it: CPU, memory, the peak of it; and what machine that is."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

_KB: Final = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


def tree(*roots: int) -> list[psutil.Process]:
    """The processes and all that they have started."""
    found = [psutil.Process(root) for root in roots]
    return [*found, *(child for root in found for child in root.children(recursive=True))]


def cpu_seconds(*roots: int) -> float:
    """CPU time of the trees so far: user and system, of children that have ended as well."""
    total = 0.0
    for process in tree(*roots):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:  # ended meanwhile: it is in its parent's sum of the next look
            continue
    return total


def pss(pid: int) -> int:
    """Bytes of memory that are a process's own, with its part of what it shares (proportional set size)."""
    return _kilobytes(pid, "smaps_rollup")["Pss"] * 1024


def peak(pid: int) -> int:
    """Bytes that a process had in memory at most (VmHWM)."""
    return _kilobytes(pid, "status")["VmHWM"] * 1024


def _kilobytes(pid: int, file: str) -> dict[str, int]:
    return {name: int(value) for name, value in _KB.findall(Path(f"/proc/{pid}/{file}").read_text())}


def describe(programs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The machine, and the versions of what ran on it: `programs` as (name, version)."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "machine": f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}, "
        f"{psutil.virtual_memory().total / 1024**3:.0f} GB",
        "Python": platform.python_version(),
        **dict(programs),
    }
