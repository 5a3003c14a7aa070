"""Where a handler hangs: the frames of a handler process, taken just before it is killed at its time-out.

Python's faulthandler writes them from within a signal handler, so that it does not matter whether the handler holds the
interpreter or waits in a library. Must not wait for long: the lane stands still meanwhile.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

# Handlers may use SIGUSR1, as libraries do. What a plugin does with SIGUSR2 takes its frames from it, no more.
_SIGNAL: Final = signal.SIGUSR2
# Seconds until a process that writes nothing is given up, and until one that has written has finished.
_PATIENCE: Final = 1.0
_SETTLED: Final = 0.02
_LARGEST: Final = 256 * 1024
_MOST_FRAMES: Final = 50

_LINE: Final = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')
_THREAD: Final = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_NOT_NAME: Final = re.compile(r"[^\w.<>:/-]", re.ASCII)
# The file in which a handler is called; its frames and those outside of it are ours.
_CALLER: Final = "receiver/worker/handler_process/executor.py"


def new_file() -> int:
    """A file in memory that a process writes its frames to; a descriptor."""
    return os.memfd_create("frames", 0)


def answer_to_signal(descriptor: int) -> None:
    """In the handler process: write the frames of all threads to the file when asked.

    The calling thread, and those that it starts, do not take the signal: a library's call that a signal interrupts
    could return as if it had done its work. One thread takes it (`take_signal`).
    """
    faulthandler.register(_SIGNAL, file=descriptor, all_threads=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})


def take_signal() -> None:
    """The calling thread is the one that takes the signal; it runs no handler."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})


def frames(pid: int, descriptor: int, path: Sequence[str]) -> tuple[str, ...]:
    """The frames of the handler that runs in a process of ours, as module:line:function; none if it does not tell.

    `path`: the process's sys.path, by which files are named as modules.
    """
    with suppress(OSError):
        os.kill(pid, _SIGNAL)
        by, size = time.monotonic() + _PATIENCE, 0
        while time.monotonic() < by:
            time.sleep(_SETTLED)
            before, size = size, os.fstat(descriptor).st_size
            if size and size == before:
                break
        return parse(os.pread(descriptor, _LARGEST, 0).decode(errors="replace"), path)
    return ()


def parse(dump: str, path: Sequence[str]) -> tuple[str, ...]:
    """The handler's frames in what faulthandler wrote, outermost first."""
    for thread in _THREAD.split(dump):
        found = [each for each in map(_LINE.fullmatch, thread.splitlines()) if each is not None]
        ours = next((n for n, each in enumerate(found) if each["file"].endswith(_CALLER)), None)
        if ours is not None:
            named = [_frame(each["file"], each["line"], each["name"], path) for each in found[:ours]]
            return tuple(reversed(named[:_MOST_FRAMES]))
    return ()


def _frame(file: str, line: str, name: str, path: Sequence[str]) -> str:
    inside = [entry for entry in path if file.startswith(f"{entry}/")]
    module = file[len(max(inside, key=len)) + 1 :] if inside else Path(file).name
    module = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return _NOT_NAME.sub("?", f"{module}:{line}:{name}")
