"""The places of a worker: as many threads as handlers may run at once, each with a handler process kept warm.

May not know what is run. The threads are daemons: one that waits for a frozen database keeps nobody from ending.
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
    """`run` is called in one of `count` threads, with its slot, for each lane that is given to it."""

    def __init__(self, count: int, run: Callable[[HandlerSlot, str], None], hello: Callable[[], Init]) -> None:
        self._run = run
        self._waiting: queue.SimpleQueue[tuple[str, Future[None]] | None] = queue.SimpleQueue()
        # The last one used is used next: its process is warm, and the others need none as long as nothing waits.
        self._free = [HandlerSlot(hello) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, name=f"place-{number}", daemon=True) for number in range(count)
        ]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def give(self, lane: str) -> Future[None]:
        """Have the lane run by the first place that is free; the future is done when that has ended."""
        done: Future[None] = Future()
        self._waiting.put((lane, done))
        return done

    def close(self) -> None:
        """Take nothing more; each place ends its handler process when it is idle."""
        for _ in self._threads:
            self._waiting.put(None)

    def closed(self) -> bool:
        """Whether all have."""
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            lane, done = given
            if done.set_running_or_notify_cancel():
                slot = self._free.pop()
                try:
                    self._run(slot, lane)
                except Exception:
                    log.exception("lane.failed", lane=lane)  # and the place outlives it
                self._free.append(slot)
                done.set_result(None)
        self._free.pop().close()
