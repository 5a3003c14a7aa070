"""CPU, memory and peak memory of processes, from /proc, and a description of the machine."""

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
    """Return the processes and all their descendants."""
    found = [psutil.Process(root) for root in roots]
    return [*found, *(child for root in found for child in root.children(recursive=True))]


def cpu_seconds(*roots: int) -> float:
    """Return the CPU time of the process trees so far, user and system, with children that have ended."""
    total = 0.0
    for process in tree(*roots):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:  # it has ended: the next call finds it in its parent's sum
            continue
    return total


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes: its own memory, and its share of shared memory."""
    return _kilobytes(pid, "smaps_rollup")["Pss"] * 1024


def peak(pid: int) -> int:
    """Return the peak resident memory of a process in bytes (VmHWM)."""
    return _kilobytes(pid, "status")["VmHWM"] * 1024


def _kilobytes(pid: int, file: str) -> dict[str, int]:
    return {name: int(value) for name, value in _KB.findall(Path(f"/proc/{pid}/{file}").read_text())}


def describe(programs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Describe the machine and its software: `programs` as (name, version)."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "machine": f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}, "
        f"{psutil.virtual_memory().total / 1024**3:.0f} GB",
        "Python": platform.python_version(),
        **dict(programs),
    }
