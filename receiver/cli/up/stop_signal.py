"""The signals that stop `up`, or make it reload the settings."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignal:
    """The requests that `up` received as signals."""

    def __init__(self) -> None:
        self.count = 0
        self.renew = False  # reload the settings; reset by the code that reloads them

    @property
    def stop(self) -> bool:
        """Stop gracefully."""
        return self.count > 0

    @property
    def hurry(self) -> bool:
        """Stop at once: the signal came twice."""
        return self.count > 1


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Record SIGTERM, SIGINT and SIGHUP while the block runs. They do not interrupt it.

    With a terminal, SIGHUP means that the terminal was closed, and stops `up`. Without one, it reloads the settings. A
    signal that was ignored at start (nohup) stays ignored.
    """
    orders = StopSignal()
    terminal = _has_terminal()

    def take(number: int, _frame: object) -> None:
        if number == signal.SIGHUP and not terminal:
            orders.renew = True
        else:
            orders.count += 1

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for each, how in before.items():
        if how is not signal.SIG_IGN:
            signal.signal(each, take)
    try:
        yield orders
    finally:
        for each, how in before.items():
            signal.signal(each, how)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
