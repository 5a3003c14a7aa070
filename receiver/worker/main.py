"""The delivery worker: takes lanes, runs them in handler processes, and does the background work.

Must not run a handler itself. Must not import a handler, except to read its declaration. Any number of workers on any
hosts share one database. Each worker takes the lanes of the handlers that it has loaded.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver.database.compatibility import SCHEMA_POLL_INTERVAL, SchemaMonitor
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import describe, open_engine, sqlstate
from receiver.errors import ConfigurationError, ReceiverError
from receiver.fault_injection import enable
from receiver.protocol.registry import Registry, Subscription
from receiver.settings import Settings
from receiver.storage.accept import replay_guard
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.queue import maintenance, outcomes, partitions, wake_ups
from receiver.storage.queue.handler_problems import HandlerProblem
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.follower import RegistryFollower
from receiver.worker import discovery, lane_scheduler
from receiver.worker.discovery import Loaded, PluginError
from receiver.worker.handler_pool import HandlerPool
from receiver.worker.handler_process.bootstrap import init_message, process_name
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerProcessGone, HandlerSlot
from receiver.worker.job_queue import JobQueue
from receiver.worker.lane_run import run_lane, run_lanes
from receiver.worker.lane_scheduler import LaneScheduler
from receiver.worker.leases import Leases
from receiver.worker.outbox_worker import SENDERS, OutboxWorker
from receiver.worker.problem_reporter import ProblemReporter, problem_of_failure, summary

log: Final = structlog.get_logger(__name__)

# Seconds that a lane may run while other lanes wait for a process.
SLICE: Final = 3.0
# Seconds that a running handler may continue after the worker was asked to stop. Another worker runs the rest of its
# lane.
GRACE: Final = 30.0
# Seconds between sweeps for due lanes without a notification, over all workers together; and the lanes per sweep.
SWEEP: Final = 1.0
SWEEP_LANES: Final = 500
# Seconds between: heartbeats, registry updates, patient indexing when there was none, removal of expired keys.
_HEARTBEAT_INTERVAL: Final = 5.0
_REGISTRY_INTERVAL: Final = 0.5
_INDEX_INTERVAL: Final = 1.0
_FORGET_INTERVAL: Final = 60.0
_PARTITION_INTERVAL: Final = 3600.0
# Seconds between reports of changed handler problems.
_REPORT_INTERVAL: Final = 1.0
# Seconds until a plugin that could not be loaded is tried again: you may have installed what it lacked.
_RELOAD_INTERVAL: Final = 30.0
# Seconds between checks for a stop request.
_POLL_INTERVAL: Final = 0.1
# Seconds to wait after an error of the database, or of a handler process that does not start.
_PAUSE: Final = 1.0
_UNLOADED_PAUSE: Final = 10.0
# Seconds. The limit for the worker's own statements.
_STATEMENT_TIMEOUT: Final = 10.0
_DUPLICATE: Final = "23505"


def run_worker(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT, then claim no more lanes, wait for handlers to end, and release the lanes.

    A second signal stops at once. Returns the exit status. Raises ConfigurationError at the start for the settings or
    the keyring. A plugin that cannot be loaded does not stop the worker: its deliveries wait, and `status` shows it.
    """
    worker = DeliveryWorker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    return 0


def address(settings: Settings) -> str:
    """Return DATABASE_URL, or the URL of the embedded PostgreSQL. Raises ConfigurationError if that does not run."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


class DeliveryWorker:
    """One worker process. `run` returns after `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.name: Final = process_name()
        self._settings = settings
        self._url = address(settings)
        keyring = self._keyring = keyrings.load_keyring(settings.keyring_path)
        self._seals = Sealer(keyring)
        self._digests = KeyedDigests(keyring)
        # One connection for each lane that is claimed or released, and one for each background thread.
        self._engine = open_engine(
            self._url, pool_size=settings.concurrency + SENDERS + 10, statement_timeout=_STATEMENT_TIMEOUT
        )
        self._schema = SchemaMonitor(self._engine)
        self._follower = RegistryFollower(self._engine, keyring)
        self._registration = RegistryChanges(self._engine, keyring, actor=f"worker:{self.name}")
        self._leases = Leases(self._engine, self.name)
        self._scheduler = LaneScheduler(self._leases)
        self._outgoing = OutboxWorker(self._url, keyring, self._leases, lease=settings.lease, rate=settings.redox_rate)
        self._problems = ProblemReporter(self.name)
        self._pool = HandlerPool(
            settings.concurrency, self._run_lane, lambda: init_message(settings, self._url, self._handlers)
        )
        self._handlers: tuple[str, ...] = ()  # loaded in this process, by name
        self._version: int | None = None  # the registry version that they were loaded for
        self._reload_at = math.inf  # when to try failed plugins again
        self._others = 0  # live workers that have loaded some of the same handlers
        self._swept = ""  # the cursor of the sweep
        self._closed: set[int] = set()  # messages whose payload cannot be decrypted here
        self._refreshed: set[str] = set()  # handlers whose declaration was written to the registry
        self._stop_requests = 0  # number of stop requests
        self._stopping = threading.Event()

    # --- Life cycle

    def stop(self) -> None:
        """Stop in order; at the second call, at once. Safe in signal handlers: it only increments a counter."""
        self._stop_requests += 1

    def run(self) -> None:
        """Work until `stop`."""
        enable.enable_faults(self._url)
        self._await_schema()
        self._follower.start()
        while self._follower.current is None and not self._stop_requests:
            time.sleep(_POLL_INTERVAL)
        if self._follower.current is not None:
            self._load(self._follower.current)
        log.info("worker.started", worker=self.name, handlers=list(self._handlers))
        self._pool.start()
        self._outgoing.start()
        taking = threading.Thread(target=lambda: asyncio.run(self._take_lanes()), name="lanes", daemon=True)
        taking.start()
        for interval, work in (
            (self._settings.lease / 3, self._renew),
            (_PAUSE, self._leases.release),
            (_HEARTBEAT_INTERVAL, self._heartbeat),
            (_REPORT_INTERVAL, self._report_problems),
            (SWEEP, self._sweep),
            (SWEEP, self._outgoing.sweep),
            (_REGISTRY_INTERVAL, self._follow),
            (_INDEX_INTERVAL, self._index),
            (_FORGET_INTERVAL, self._forget),
            (_PARTITION_INTERVAL, self._make_partitions),
            (SCHEMA_POLL_INTERVAL, self._check_schema),
        ):
            threading.Thread(target=self._repeat, args=(interval, work), name=work.__name__, daemon=True).start()
        while not self._stop_requests:
            time.sleep(_POLL_INTERVAL)
        self._end(taking)

    def _await_schema(self) -> None:
        """Wait until the database schema is compatible. Nothing else runs meanwhile."""
        while not self._stop_requests and not ((found := self._schema.check()) and found.compatible):
            time.sleep(SCHEMA_POLL_INTERVAL)

    def _check_schema(self) -> None:
        """Check the schema. If it is no longer compatible, stop in order: the restarted worker waits for a compatible
        schema.
        """
        found = self._schema.check()
        if found is not None and not found.compatible and not self._stop_requests:
            self.stop()

    def _end(self, taking: threading.Thread) -> None:
        log.info("worker.stopping", worker=self.name)
        self._stopping.set()
        by = time.monotonic() + GRACE
        self._leases.leave(by)
        self._pool.close()
        self._outgoing.stop()
        renew_at = 0.0
        while time.monotonic() < by + _PAUSE and not (
            self._pool.closed() and self._outgoing.ended() and not taking.is_alive()
        ):
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._settings.lease / 3
                self._renew()
            if self._stop_requests > 1 and by > time.monotonic():
                by = time.monotonic()
                self._leases.leave(by)
            time.sleep(_POLL_INTERVAL)
        self._follower.stop()
        try:
            self._leases.release()
            self._problems.withdraw(self._leases.connection)
            with self._leases.connection() as connection:
                maintenance.gone(connection, self.name)
        except SQLAlchemyError as exc:
            log.warning("worker.left_without_word", error=describe(exc))
        log.info("worker.stopped", worker=self.name)

    def _repeat(self, interval: float, work: Callable[[], float | None]) -> None:
        """Call `work` periodically. It may return the seconds to wait. Database errors are logged and retried."""
        while not self._stopping.is_set():
            pause: float | None = None
            try:
                pause = work()
            except SQLAlchemyError as exc:
                log.warning("worker.database_error", part=work.__name__, error=describe(exc))
                pause = max(_PAUSE, min(interval, _UNLOADED_PAUSE))
            except Exception:
                log.exception("worker.failed", part=work.__name__)  # and continue
            self._stopping.wait(interval if pause is None else pause)

    # --- Handlers

    def _load(self, registry: Registry) -> None:
        """Load the enabled handlers, each plugin separately, and write their declarations to the registry.

        A plugin that cannot be loaded is reported, and treated as not installed: its deliveries wait.
        """
        importlib.invalidate_caches()
        enabled = {each.handler for destination in registry.destinations.values() for each in destination.subscriptions}
        plugins = discovery.load_handlers(enabled, self._settings.handlers)
        loaded = plugins.loaded
        problems = [
            problem_of_failure(each, "plugin_not_loaded", each.handler or each.origin) for each in plugins.failures
        ]
        failed = {each.handler for each in problems}
        for name in sorted(enabled - loaded.keys() - failed):
            log.warning("handler.not_installed", handler=name)
        conflicts = discovery.responder_conflicts(
            {
                destination.name: [
                    loaded[each.handler].spec for each in destination.subscriptions if each.handler in loaded
                ]
                for destination in registry.destinations.values()
            }
        )
        problems += [_conflict(handler, destination, sentence) for handler, destination, sentence in conflicts]
        bindings = self._development_bindings(loaded)
        for each in loaded.values():
            problems += self._register(each, bindings)
        for problem in problems:
            log.error(
                "handler.not_loaded",
                handler=problem.handler,
                destination=problem.destination or None,
                error_class=problem.error_class,
                error=problem.detail,
            )
        self._problems.replace_all("plugin_not_loaded", problems)
        self._reload_at = time.monotonic() + _RELOAD_INTERVAL if problems else math.inf
        self._version = registry.version
        self._handlers = tuple(sorted(name for name, each in loaded.items() if each.declaration.role == "handler"))

    def _development_bindings(self, loaded: Mapping[str, Loaded]) -> Mapping[str, set[str]]:
        """Return the handlers that were ever bound to each development destination."""
        if not any(each.development for each in loaded.values()):
            return {}
        with self._engine.connect() as connection:
            return maintenance.development_bindings(connection)

    def _register(self, each: Loaded, bindings: Mapping[str, set[str]]) -> list[HandlerProblem]:
        """Bind the handlers of RECEIVER_HANDLERS to development destinations, once, and store the handler's
        declaration.

        If the registry refuses the declaration, this is a problem of this handler only.
        """
        name, problems = each.declaration.name, []
        for destination, names in bindings.items():
            if each.development and name not in names:
                try:
                    self._registration.enable_handler(destination, each.spec, datetime.now(UTC))
                except ReceiverError as exc:
                    problems.append(_conflict(name, destination, f"{name} ({each.origin}): {exc}"))
        # Only once, not at each change: two workers with different versions of a plugin would overwrite each other
        # forever.
        if name not in self._refreshed:
            try:
                self._registration.refresh_handlers([each.spec], datetime.now(UTC))
                self._refreshed.add(name)
            except ReceiverError as exc:
                problems.append(_conflict(name, "", f"{name} ({each.origin}): {exc}"))
        return problems

    def _follow(self) -> None:
        """Load newly enabled handlers, and try failed plugins again."""
        registry = self._follower.current
        if registry is not None and (registry.version != self._version or time.monotonic() >= self._reload_at):
            self._load(registry)

    def _report_problems(self) -> None:
        self._problems.flush(self._leases.connection)

    # --- Lanes

    async def _take_lanes(self) -> None:
        """Take lanes of the loaded handlers from the job queue. Restart it when other handlers are loaded."""
        taking: asyncio.Task[None] | None = None
        taken: tuple[str, ...] = ()
        while not self._stopping.is_set():
            if taken != self._handlers:
                if taking is not None:
                    taking.cancel()
                taken = self._handlers
                taking = asyncio.create_task(
                    JobQueue(
                        self._url,
                        taken,
                        self._run,
                        concurrency=self._settings.concurrency,
                        name=self.name,
                        lease=self._settings.lease,
                    ).serve()
                )
            await asyncio.sleep(0.1)
        if taking is not None:
            taking.cancel()
            await asyncio.wait([taking])

    async def _run(self, lane: str) -> None:
        await asyncio.wrap_future(self._pool.submit(lane))

    def _run_lane(self, slot: HandlerSlot, lane: str) -> None:
        """In a pool thread: run the lane until it is empty or waits, or other lanes wait for the thread."""
        try:
            if (handler := wake_ups.many(lane)) is not None:
                self._run_lanes(slot, handler)
                return
            while not self._stopping.is_set() and self._run_once(slot, lane):
                with self._leases.connection() as connection:
                    if wake_ups.others_wait(connection, self._handlers):
                        self._defer(lane)
                        return
        except SQLAlchemyError as exc:
            log.warning("lane.not_run", lane=lane, error=describe(exc))
        except ConfigurationError as exc:
            self._not_started(lane, exc)
            log.error("lane.handler_not_loaded", lane=lane, error=summary(exc))
            self._stopping.wait(_UNLOADED_PAUSE)
        except HandlerProcessGone as exc:
            self._not_started(lane, exc)
            log.error("lane.process_not_started", lane=lane, error=str(exc))
            self._stopping.wait(_PAUSE)

    def _not_started(self, lane: str, exc: ReceiverError) -> None:
        """Report that the worker has loaded the handler, but its handler processes cannot."""
        handler = lane.partition("/")[0]
        if isinstance(exc, PluginError):
            self._problems.add(problem_of_failure(exc.failure, "handler_not_started", handler))
        else:
            self._problems.add(
                HandlerProblem(
                    kind="handler_not_started", handler=handler, detail=str(exc), error_class=type(exc).__name__
                )
            )

    def _run_lanes(self, slot: HandlerSlot, handler: str) -> None:
        """Run many lanes in batches until none is due. Free slots are notified to help."""
        leave_at = time.monotonic() + SLICE
        while not self._stopping.is_set() and (names := self._scheduler.next(handler)):
            self._defer_many(handler)
            if time.monotonic() >= leave_at:
                return
            subscription = self._subscription(names[0])
            if subscription is None:
                continue
            began = time.monotonic()
            left = run_lanes(
                slot,
                self._leases,
                names,
                subscription,
                lease=self._settings.lease,
                leave_after=lane_scheduler.BATCH_SECONDS,
                others=lambda: self._defer_many(handler),
                development=self._development(names[0]),
            )
            self._scheduler.took(handler, time.monotonic() - began)
            self._clear_start_problem(handler, left)
            if left is not None and left.why == "dead":
                self._pause_if_many_dead(names[0], left)

    def _run_once(self, slot: HandlerSlot, lane: str) -> bool:
        """Run the lane once. Returns True if there may be more to run now."""
        subscription = self._subscription(lane)
        if subscription is None:
            return False
        left = run_lane(
            slot,
            self._leases,
            lane,
            subscription,
            lease=self._settings.lease,
            leave_after=SLICE,
            development=self._development(lane),
        )
        self._clear_start_problem(subscription.handler, left)
        if left is not None and left.why == "dead":
            self._pause_if_many_dead(lane, left)
        return left is not None and left.why in ("time", "dead")

    def _clear_start_problem(self, handler: str, left: LaneDone | None) -> None:
        if left is not None:
            self._problems.clear(handler, "", "handler_not_started")

    def _subscription(self, lane: str) -> Subscription | None:
        handler, name, _ = lane.split("/", 2)
        registry = self._follower.current
        destination = None if registry is None else registry.destinations.get(name)
        if destination is None or handler not in self._handlers:
            return None
        return next((each for each in destination.subscriptions if each.handler == handler), None)

    def _development(self, lane: str) -> bool:
        """Return True if the lane's destination is a development one."""
        registry = self._follower.current
        destination = None if registry is None else registry.destinations.get(lane.split("/", 2)[1])
        return destination is not None and destination.environment == "development"

    def _pause_if_many_dead(self, lane: str, left: LaneDone) -> None:
        """Pause the handler after many dead deliveries with the same error, because the messages are probably not the
        cause.

        The remaining deliveries stay pending until an operator resumes the handler.
        """
        handler, destination, _ = lane.split("/", 2)
        with self._leases.connection() as connection:
            count = outcomes.recently_dead(connection, handler, destination, left.error_class)
        if count >= self._settings.pause_after_dead:
            log.error(
                "handler.paused", handler=handler, destination=destination, error_class=left.error_class, count=count
            )
            self._registration.pause_handler(
                handler, datetime.now(UTC), destination=destination, reason=f"many_dead:{left.error_class}"
            )

    # --- Background work

    def _renew(self) -> None:
        self._leases.renew(self._settings.lease)

    def _heartbeat(self) -> None:
        self._keyring.refresh()
        held = [key.id for key in self._keyring.keys]
        with self._leases.connection() as connection:
            self._others = maintenance.seen(
                connection, self.name, socket.gethostname(), os.getpid(), self._handlers, held
            )

    def _sweep(self) -> float | None:
        """Look for due lanes without a notification. The more workers there are, the less often each one looks."""
        with self._leases.connection() as connection:
            found, self._swept = wake_ups.due(connection, self._handlers, after=self._swept, limit=SWEEP_LANES)
            wake_ups.wake(connection, found)
        return SWEEP * (1 + self._others)

    def _defer(self, lane: str) -> None:
        try:
            with self._leases.connection() as connection:
                wake_ups.defer(connection, lane)
        except SQLAlchemyError as exc:
            if sqlstate(exc) != _DUPLICATE:
                raise

    def _defer_many(self, handler: str) -> None:
        try:
            with self._leases.connection() as connection:
                wake_ups.defer_many(connection, handler)
        except SQLAlchemyError as exc:
            if sqlstate(exc) != _DUPLICATE:
                raise

    def _index(self) -> float | None:
        with self._engine.begin() as connection:
            claimed = maintenance.claim_unindexed(connection, without=self._closed)
        if not claimed:
            return None
        with self._engine.begin() as connection:
            self._closed.update(maintenance.index_patients(connection, self._seals, self._digests, claimed))
        return 0.0

    def _forget(self) -> float | None:
        with self._leases.connection() as connection:
            forgotten = maintenance.forget_keys(connection) + replay_guard.forget(connection)
        return 0.0 if forgotten else None

    def _make_partitions(self) -> None:
        with self._engine.begin() as connection:
            made = partitions.ensure(connection, maintenance.now(connection))
            maintenance.forget_activity(connection)
        if made:
            log.info("partitions.made", count=len(made))


def _conflict(handler: str, destination: str, sentence: str) -> HandlerProblem:
    """Make the HandlerProblem for a declaration that the registry refuses."""
    return HandlerProblem(
        kind="plugin_not_loaded", handler=handler, destination=destination, error_class="Conflict", detail=sentence
    )
