"""Hang reports: the stack frames of a handler process, taken just before it is killed at its timeout.

Python's faulthandler writes them in a signal handler, so they are available even if the handler holds the interpreter
lock or waits in a library. Must not wait for long: the lane is blocked meanwhile.
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

# Handlers and libraries may use SIGUSR1. A plugin that uses SIGUSR2 loses only its own frames.
_SIGNAL: Final = signal.SIGUSR2
# Seconds to wait for the first byte of the dump, and for the rest of it.
_DUMP_TIMEOUT: Final = 1.0
_SETTLED: Final = 0.02
_LARGEST: Final = 256 * 1024
_MOST_FRAMES: Final = 50

_LINE: Final = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')
_THREAD: Final = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_NOT_NAME: Final = re.compile(r"[^\w.<>:/-]", re.ASCII)
# The files that call the handler. Their frames, and the frames outside of them, belong to the receiver.
_CALLERS: Final = ("receiver/worker/handler_process/executor.py", "receiver/worker/handler_process/responder.py")


def new_file() -> int:
    """Create an in-memory file for the frames of one process. Returns its descriptor."""
    return os.memfd_create("frames", 0)


def answer_to_signal(descriptor: int) -> None:
    """In the handler process: write the frames of all threads to the file at the signal.

    The calling thread, and threads that it starts, block the signal: an interrupted library call could return as if it
    had succeeded. One thread receives the signal (`take_signal`).
    """
    faulthandler.register(_SIGNAL, file=descriptor, all_threads=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})


def take_signal() -> None:
    """Make the calling thread the one that receives the signal. It must not run a handler."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})


def frames(pid: int, descriptor: int, path: Sequence[str]) -> tuple[str, ...]:
    """Return the frames of the handler that runs in a child process, as module:line:function. Empty if there is no
    response.

    `path`: the sys.path of the process, to derive module names from file names.
    """
    with suppress(OSError):
        os.kill(pid, _SIGNAL)
        by, size = time.monotonic() + _DUMP_TIMEOUT, 0
        while time.monotonic() < by:
            time.sleep(_SETTLED)
            before, size = size, os.fstat(descriptor).st_size
            if size and size == before:
                break
        return parse(os.pread(descriptor, _LARGEST, 0).decode(errors="replace"), path)
    return ()


def parse(dump: str, path: Sequence[str]) -> tuple[str, ...]:
    """Extract the handler's frames from faulthandler's output, outermost first."""
    for thread in _THREAD.split(dump):
        found = [each for each in map(_LINE.fullmatch, thread.splitlines()) if each is not None]
        ours = next((n for n, each in enumerate(found) if each["file"].endswith(_CALLERS)), None)
        if ours is not None:
            named = [_frame(each["file"], each["line"], each["name"], path) for each in found[:ours]]
            return tuple(reversed(named[:_MOST_FRAMES]))
    return ()


def _frame(file: str, line: str, name: str, path: Sequence[str]) -> str:
    inside = [entry for entry in path if file.startswith(f"{entry}/")]
    module = file[len(max(inside, key=len)) + 1 :] if inside else Path(file).name
    module = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return _NOT_NAME.sub("?", f"{module}:{line}:{name}")
