"""The outbox worker: sends the requests of the outbox to Redox, lane by lane.

Must not run in the threads of handlers, so that a slow Redox delays no handler. It needs no killable process, because
each call has a deadline and runs only the receiver's code.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe, open_engine
from receiver.keyring import Keyring
from receiver.outbound.limits import Limits, SlidingWindow
from receiver.outbound.outbox import Clients, OutboundRecorder
from receiver.outbound.outbox.sending import LaneSender
from receiver.storage.queue import outbox, wake_ups
from receiver.worker.job_queue import JobQueue
from receiver.worker.leases import Leases

log: Final = structlog.get_logger(__name__)

# The number of lanes that one worker sends from at the same time.
SENDERS: Final = 4
# Seconds that a lane may run, because other lanes may wait.
SLICE: Final = 3.0
# Seconds. The limit for a statement.
_STATEMENT_TIMEOUT: Final = 10.0
_POLL_INTERVAL: Final = 0.1


class OutboxWorker:
    """The outbox worker of one worker process, with leases of `lease` seconds. Call `start` after fork, `sweep`
    periodically.
    """

    def __init__(self, url: str, keyring: Keyring, leases: Leases, *, lease: float, rate: int) -> None:
        self._url = url
        self._leases = leases
        self._lease = lease
        self._database = open_engine(url, pool_size=2 * SENDERS, statement_timeout=_STATEMENT_TIMEOUT)
        # One attempt per call: later attempts are made by the outbox, whose pauses block no thread.
        self._clients = Clients(self._database, keyring, limits=Limits(attempts=1), rate=SlidingWindow(rate))
        self._sender = LaneSender(
            self._database, self._clients, OutboundRecorder(self._database, keyring), name=leases.owner
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._take()), name="outbox", daemon=True)
        self._senders: set[threading.Thread] = set()

    def start(self) -> None:
        """Start to take lanes."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more lanes. Current requests are completed, or another worker sends them again."""
        self._stopping.set()

    def ended(self) -> bool:
        """Return True when no request is being sent."""
        return not self._thread.is_alive() and not any(thread.is_alive() for thread in list(self._senders))

    def sweep(self) -> None:
        """Notify workers of the lanes that are due. Raises SQLAlchemyError."""
        with self._leases.connection() as connection:
            found = outbox.due(connection)
        for lane in found:
            self._defer(lane)

    async def _take(self) -> None:
        engine = JobQueue(
            self._url,
            [outbox.QUEUE],
            self._run,
            concurrency=SENDERS,
            name=f"{self._leases.owner}:outbox",
            lease=self._lease,
        )
        serving = asyncio.create_task(engine.serve())
        while not self._stopping.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(_POLL_INTERVAL)
        serving.cancel()
        await asyncio.wait([serving])

    async def _run(self, lane: str) -> None:
        # A daemon thread: the interpreter waits at exit for the threads of a pool, and must not wait for this one.
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it runs to its end, even if its job is cancelled
        thread = threading.Thread(target=self._work, args=(lane, done), name=f"sending {lane}", daemon=True)
        self._senders = {each for each in self._senders if each.is_alive()} | {thread}
        thread.start()
        await asyncio.wrap_future(done)

    def _work(self, lane: str, done: Future[None]) -> None:
        try:
            if self._run_once(lane) and not self._stopping.is_set():
                self._defer(lane)
        except SQLAlchemyError as exc:
            log.warning("outbox.lane_not_sent", lane=lane, error=describe(exc))
        except Exception:
            log.exception("outbox.lane_failed", lane=lane)
        finally:
            done.set_result(None)

    def _run_once(self, lane: str) -> bool:
        """Send the requests of the lane. Returns True if there may be more."""
        held = self._leases.claim(lane, self._lease, take=outbox.claim)
        if held is None:
            return False
        leave_at = time.monotonic() + SLICE
        try:
            return self._sender.run(held.lease, lambda: held.leave_by is None and time.monotonic() < leave_at)
        finally:
            self._leases.give_back(held)

    def _defer(self, lane: str) -> None:
        with self._leases.connection() as connection:
            wake_ups.defer(connection, lane)
