"""The handler pool of a worker: one thread for each handler that may run at once, each with a warm handler process.

Must not depend on what is run. The threads are daemons, so a thread that waits for an unresponsive database does not
block shutdown.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import structlog

from receiver.worker.handler_process.ipc import Init
from receiver.worker.handler_process.supervisor import HandlerSlot

log: Final = structlog.get_logger(__name__)


class HandlerPool:
    """A pool of `count` threads. Calls `run` in one of them, with its handler slot, for each submitted lane."""

    def __init__(self, count: int, run: Callable[[HandlerSlot, str], None], init: Callable[[], Init]) -> None:
        self._run = run
        self._waiting: queue.SimpleQueue[tuple[str, Future[None]] | None] = queue.SimpleQueue()
        # The last slot used is used first: its process is warm. The other slots start no process while one is enough.
        self._free = [HandlerSlot(init) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, name=f"place-{number}", daemon=True) for number in range(count)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, lane: str) -> Future[None]:
        """Submit a lane. The first free thread runs it; the future completes when the run has ended."""
        done: Future[None] = Future()
        self._waiting.put((lane, done))
        return done

    def close(self) -> None:
        """Accept no more lanes. Each thread ends its handler process when it is idle."""
        for _ in self._threads:
            self._waiting.put(None)

    def closed(self) -> bool:
        """Return True when all threads have ended."""
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (submitted := self._waiting.get()) is not None:
            lane, done = submitted
            if done.set_running_or_notify_cancel():
                slot = self._free.pop()
                try:
                    self._run(slot, lane)
                except Exception:
                    log.exception("lane.failed", lane=lane)  # the thread continues
                self._free.append(slot)
                done.set_result(None)
        self._free.pop().close()
