"""Lane worker: takes lanes from the job queue and runs them, each in a thread of the handler pool.

Must not claim a lane or record an outcome itself (see receiver.worker.lane_run).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.errors import ConfigurationError, ReceiverError
from receiver.protocol.registry import Destination, Registry, Subscription
from receiver.settings import Settings
from receiver.storage.queue import outcomes, wake_ups
from receiver.storage.queue.handler_problems import HandlerProblem
from receiver.storage.registry.changes import RegistryChanges
from receiver.worker import lane_scheduler
from receiver.worker.handler_loader import HandlerLoader
from receiver.worker.handler_pool import HandlerPool
from receiver.worker.handler_process.bootstrap import init_message
from receiver.worker.handler_process.child import HandlerProcessGone
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerSlot
from receiver.worker.job_queue import JobQueue
from receiver.worker.lane_run import run_lane, run_lanes
from receiver.worker.lane_scheduler import LaneScheduler
from receiver.worker.leases import Leases
from receiver.worker.load_failure import PluginError
from receiver.worker.problem_reporter import ProblemReporter, problem_of_failure, summary

log: Final = structlog.get_logger(__name__)

# Seconds that a lane may run while other lanes wait for a process.
SLICE: Final = 3.0
# Seconds to wait after a handler process did not start, and after a handler could not be loaded.
_PAUSE: Final = 1.0
_UNLOADED_PAUSE: Final = 10.0
# Seconds between checks for newly loaded handlers.
_POLL_INTERVAL: Final = 0.1


class LaneWorker:
    """Runs the lanes of the loaded handlers until `stopping` is set. `registry` returns the current registry."""

    def __init__(
        self,
        settings: Settings,
        url: str,
        leases: Leases,
        *,
        handlers: HandlerLoader,
        registry: Callable[[], Registry | None],
        changes: RegistryChanges,
        problems: ProblemReporter,
        stopping: threading.Event,
    ) -> None:
        self._settings = settings
        self._url = url
        self._leases = leases
        self._handlers = handlers
        self._registry = registry
        self._changes = changes
        self._problems = problems
        self._stopping = stopping
        self._scheduler = LaneScheduler(leases)
        self._pool = HandlerPool(
            settings.concurrency,
            self._run_lane,
            lambda: init_message(settings, url, handlers=self._handlers.names, modules=self._handlers.modules),
        )
        self._taking = threading.Thread(target=lambda: asyncio.run(self._take_lanes()), name="lanes", daemon=True)

    def start(self) -> None:
        """Start to take lanes."""
        self._pool.start()
        self._taking.start()

    def close(self) -> None:
        """Accept no more lanes. `stopping` is set."""
        self._pool.close()

    def ended(self) -> bool:
        """Return True when no lane runs any more."""
        return self._pool.closed() and not self._taking.is_alive()

    async def _take_lanes(self) -> None:
        """Take lanes of the loaded handlers from the job queue. Restart it when other handlers are loaded."""
        taking: asyncio.Task[None] | None = None
        taken: tuple[str, ...] = ()
        while not self._stopping.is_set():
            if taken != self._handlers.names:
                if taking is not None:
                    taking.cancel()
                taken = self._handlers.names
                taking = asyncio.create_task(
                    JobQueue(
                        self._url,
                        taken,
                        self._submit,
                        concurrency=self._settings.concurrency,
                        name=self._leases.owner,
                        lease=self._settings.lease,
                    ).serve()
                )
            await asyncio.sleep(_POLL_INTERVAL)
        if taking is not None:
            taking.cancel()
            await asyncio.wait([taking])

    async def _submit(self, lane: str) -> None:
        await asyncio.wrap_future(self._pool.submit(lane))

    def _run_lane(self, slot: HandlerSlot, lane: str) -> None:
        """In a pool thread: run the lane until it is empty or waits, or other lanes wait for the thread."""
        try:
            if (handler := wake_ups.many(lane)) is not None:
                self._run_many(slot, handler)
                return
            while not self._stopping.is_set() and self._run_one(slot, lane):
                with self._leases.connection() as connection:
                    if wake_ups.others_wait(connection, self._handlers.names):
                        wake_ups.defer(connection, lane)
                        return
        except SQLAlchemyError as exc:
            log.warning("lane.not_run", lane=lane, error=describe(exc))
        except ConfigurationError as exc:
            self._report_not_started(lane, exc)
            log.error("lane.handler_not_loaded", lane=lane, error=summary(exc))
            slot.close()  # a new process imports what has been installed or repaired since
            self._stopping.wait(_UNLOADED_PAUSE)
        except HandlerProcessGone as exc:
            self._report_not_started(lane, exc)
            log.error("lane.process_not_started", lane=lane, error=str(exc))
            self._stopping.wait(_PAUSE)

    def _run_one(self, slot: HandlerSlot, lane: str) -> bool:
        """Run the lane once. Returns True if there may be more to run now."""
        subscription = self._subscription(lane)
        if subscription is None:
            return False
        done = run_lane(
            slot,
            self._leases,
            lane,
            subscription,
            lease=self._settings.lease,
            leave_after=SLICE,
            development=self._development(lane),
        )
        self._after(lane, done)
        return done is not None and done.why in ("time", "dead")

    def _run_many(self, slot: HandlerSlot, handler: str) -> None:
        """Run many lanes in batches until none is due. Free slots are notified to help."""
        leave_at = time.monotonic() + SLICE
        while not self._stopping.is_set() and (names := self._scheduler.next(handler)):
            self._wake_for_many(handler)
            if time.monotonic() >= leave_at:
                return
            subscription = self._subscription(names[0])
            if subscription is None:
                continue
            began = time.monotonic()
            done = run_lanes(
                slot,
                self._leases,
                names,
                subscription,
                lease=self._settings.lease,
                leave_after=lane_scheduler.BATCH_SECONDS,
                others=lambda: self._wake_for_many(handler),
                development=self._development(names[0]),
            )
            self._scheduler.took(handler, time.monotonic() - began)
            self._after(names[0], done)

    def _wake_for_many(self, handler: str) -> None:
        with self._leases.connection() as connection:
            wake_ups.defer_many(connection, handler)

    def _after(self, lane: str, done: LaneDone | None) -> None:
        """Clear the report that the handler does not start, and pause it if too many deliveries are dead."""
        if done is not None:
            self._problems.clear(lane.partition("/")[0], "", "handler_not_started")
            if done.why == "dead":
                self._pause_if_many_dead(lane, done)

    def _pause_if_many_dead(self, lane: str, done: LaneDone) -> None:
        """Pause the handler after many dead deliveries with the same error, because the messages are probably not the
        cause.

        The remaining deliveries stay pending until an operator resumes the handler.
        """
        handler, destination, _ = lane.split("/", 2)
        with self._leases.connection() as connection:
            count = outcomes.recently_dead(connection, handler, destination, done.error_class)
        if count >= self._settings.pause_after_dead:
            log.error(
                "handler.paused", handler=handler, destination=destination, error_class=done.error_class, count=count
            )
            self._changes.pause_handler(
                handler, datetime.now(UTC), destination=destination, reason=f"many_dead:{done.error_class}"
            )

    def _report_not_started(self, lane: str, exc: ReceiverError) -> None:
        """Report that the worker has loaded the handler, but its handler processes cannot."""
        handler = lane.partition("/")[0]
        if isinstance(exc, PluginError):
            problem = problem_of_failure(exc.failure, "handler_not_started", handler)
        else:
            problem = HandlerProblem(
                kind="handler_not_started", handler=handler, detail=str(exc), error_class=type(exc).__name__
            )
        self._problems.add(problem)

    def _destination(self, lane: str) -> Destination | None:
        registry = self._registry()
        return None if registry is None else registry.destinations.get(lane.split("/", 2)[1])

    def _subscription(self, lane: str) -> Subscription | None:
        """Return the subscription of the lane's handler; None if it is not loaded or not enabled."""
        handler, destination = lane.partition("/")[0], self._destination(lane)
        if destination is None or handler not in self._handlers.names:
            return None
        return next((each for each in destination.subscriptions if each.handler == handler), None)

    def _development(self, lane: str) -> bool:
        """Return True if the lane's destination is a development one."""
        destination = self._destination(lane)
        return destination is not None and destination.environment == "development"
