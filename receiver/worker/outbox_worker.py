"""The worker's other half: what the outbox keeps is brought to Redox, lane by lane, as deliveries are to handlers.

May not run in a place of the handlers': a Redox that answers slowly keeps no handler waiting. It needs no process that
can be killed, for every call has a deadline and runs no code but ours.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe, open_engine, sqlstate
from receiver.keyring import Keyring
from receiver.outbound.limits import Limits, SlidingWindow
from receiver.outbound.outbox import Clients, OutboundRecorder
from receiver.outbound.outbox.sending import LaneSender
from receiver.storage.queue import lanes, outbox
from receiver.worker.job_queue import JobQueue
from receiver.worker.leases import Leases

log: Final = structlog.get_logger(__name__)

# Lanes of one worker that are sent from at once.
SENDERS: Final = 4
# A lane is left after so long, for others may wait.
SLICE: Final = 3.0
# A statement of ours: none takes that long.
_STATEMENT: Final = 10.0
_POLL_INTERVAL: Final = 0.1
_DUPLICATE: Final = "23505"


class OutboxWorker:
    """Of one worker, under its leases of `lease` seconds. `start` after fork; `sweep` is called every second or so."""

    def __init__(self, url: str, keyring: Keyring, leases: Leases, *, lease: float, rate: int) -> None:
        self._url = url
        self._leases = leases
        self._lease = lease
        self._database = open_engine(url, pool_size=2 * SENDERS, statement_timeout=_STATEMENT)
        # One attempt: what comes after it is the outbox's own pause, in which nobody waits for a thread.
        self._clients = Clients(self._database, keyring, limits=Limits(attempts=1), rate=SlidingWindow(rate))
        self._sender = LaneSender(
            self._database, self._clients, OutboundRecorder(self._database, keyring), name=leases.owner
        )
        self._stopping = threading.Event()
        self._taking = threading.Thread(target=lambda: asyncio.run(self._take()), name="outbox", daemon=True)
        self._at_work: set[threading.Thread] = set()

    def start(self) -> None:
        """Begin to take lanes."""
        self._taking.start()

    def stop(self) -> None:
        """Take nothing more. What is being sent ends by itself, or is sent again by another worker."""
        self._stopping.set()

    def ended(self) -> bool:
        """Whether nothing is being sent any more."""
        return not self._taking.is_alive() and not any(thread.is_alive() for thread in list(self._at_work))

    def sweep(self) -> None:
        """Have workers look at the lanes whose time has come. Raises SQLAlchemyError."""
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
        taking = asyncio.create_task(engine.serve())
        while not self._stopping.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(_POLL_INTERVAL)
        taking.cancel()
        await asyncio.wait([taking])

    async def _run(self, lane: str) -> None:
        # A thread that no interpreter waits for at its end, as it does for those of a pool.
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it runs to its end, whatever becomes of the job that stands for it
        thread = threading.Thread(target=self._work, args=(lane, done), name=f"sending {lane}", daemon=True)
        self._at_work = {each for each in self._at_work if each.is_alive()} | {thread}
        thread.start()
        await asyncio.wrap_future(done)

    def _work(self, lane: str, done: Future[None]) -> None:
        try:
            if self._stay(lane) and not self._stopping.is_set():
                self._defer(lane)
        except SQLAlchemyError as exc:
            log.warning("outbox.lane_not_sent", lane=lane, error=describe(exc))
        except Exception:
            log.exception("outbox.lane_failed", lane=lane)
        finally:
            done.set_result(None)

    def _stay(self, lane: str) -> bool:
        """Send what is in the lane; whether there may be more."""
        held = self._leases.claim(lane, self._lease, take=outbox.claim)
        if held is None:
            return False
        leave_at = time.monotonic() + SLICE
        try:
            return self._sender.run(held.lease, lambda: held.leave_by is None and time.monotonic() < leave_at)
        finally:
            self._leases.give_back(held)

    def _defer(self, lane: str) -> None:
        try:
            with self._leases.connection() as connection:
                lanes.defer(connection, lane)
        except SQLAlchemyError as exc:
            if sqlstate(exc) != _DUPLICATE:
                raise
