"""The delivery worker: takes lanes, has them run by handler processes, and does what has to be done beside.

May not run a handler itself, nor import one but to see what it declares. Any number of workers, on any hosts, share one
database; each takes lanes of the handlers that it has loaded.
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
from receiver.storage.evidence.macs import PatientDigests
from receiver.storage.queue import lanes, maintenance, partitions
from receiver.storage.queue.handler_problems import HandlerProblem
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.loader import RegistryFollower
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
from receiver.worker.problem_reporter import ProblemReporter, of_failure, summary

log: Final = structlog.get_logger(__name__)

# A lane is left after so long when others wait for a process.
SLICE: Final = 3.0
# How long a running handler may go on when the worker is told to stop; the rest of its lane waits for another worker.
GRACE: Final = 30.0
# Lanes that nobody was told of are looked for so often, by all workers together; so many lanes at a time.
SWEEP: Final = 1.0
SWEEP_LANES: Final = 500
# How often a worker says that it lives, follows the registry, indexes patients when there were none, forgets keys.
_SEEN: Final = 5.0
_REGISTRY: Final = 0.5
_INDEX: Final = 1.0
_FORGET: Final = 60.0
_HOURLY: Final = 3600.0
# How often what has changed of handlers' problems is reported.
_REPORT: Final = 1.0
# A plugin that could not be loaded is tried again so often: somebody may have installed what it lacked.
_RELOAD: Final = 30.0
# How often the main thread looks whether it was told to stop.
_POLL_INTERVAL: Final = 0.1
# After an error of the database, or of a handler process that does not start.
_PAUSE: Final = 1.0
_UNLOADED_PAUSE: Final = 10.0
# A statement beside the handlers': none of ours takes that long.
_STATEMENT: Final = 10.0
_DUPLICATE: Final = "23505"


def run_worker(settings: Settings) -> int:
    """Work until SIGTERM or SIGINT: claim nothing more, let handlers end, give the lanes back. A second one hurries.

    Returns the exit status. Raises ConfigurationError at the start: the settings or the keyring. A plugin that cannot
    be loaded stops nothing: its deliveries wait, and `status` names it.
    """
    worker = DeliveryWorker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    return 0


def address(settings: Settings) -> str:
    """DATABASE_URL, or the URL of the embedded PostgreSQL. Raises ConfigurationError when that does not run."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


class DeliveryWorker:
    """One worker process. `run` returns after `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.name: Final = process_name()
        self._settings = settings
        self._url = address(settings)
        keyring = keyrings.load_keyring(settings.keyring_path)
        self._seals = Sealer(keyring)
        self._digests = PatientDigests(keyring)
        # A connection for each lane that is claimed or given back, and one for each of our threads.
        self._engine = open_engine(
            self._url, pool_size=settings.concurrency + SENDERS + 10, statement_timeout=_STATEMENT
        )
        self._schema = SchemaMonitor(self._engine)
        self._follower = RegistryFollower(self._engine, keyring)
        self._registration = RegistryChanges(self._engine, keyring, actor=f"worker:{self.name}")
        self._leases = Leases(self._engine, self.name)
        self._drains = LaneScheduler(self._leases)
        self._outgoing = OutboxWorker(self._url, keyring, self._leases, lease=settings.lease, rate=settings.redox_rate)
        self._problems = ProblemReporter(self.name)
        self._places = HandlerPool(
            settings.concurrency, self._run_lane, lambda: init_message(settings, self._url, self._handlers)
        )
        self._handlers: tuple[str, ...] = ()  # loaded here, by name
        self._version: int | None = None  # of the registry that they were loaded for
        self._reload_at = math.inf  # when what could not be loaded is tried again
        self._others = 0  # live workers that have loaded some of what we have
        self._swept = ""  # the lane that the sweep has come to
        self._closed: set[int] = set()  # messages whose payload does not open here
        self._refreshed: set[str] = set()  # handlers of which the registry was told what they declare
        self._orders = 0  # how often we were told to stop
        self._stopping = threading.Event()

    # --- its life

    def stop(self) -> None:
        """End in order; told twice, at once. For signals: it does nothing but count."""
        self._orders += 1

    def run(self) -> None:
        """Work until `stop`."""
        enable.enable_faults(self._url)
        self._await_schema()
        self._follower.start()
        while self._follower.current is None and not self._orders:
            time.sleep(_POLL_INTERVAL)
        if self._follower.current is not None:
            self._load(self._follower.current)
        log.info("worker.started", worker=self.name, handlers=list(self._handlers))
        self._places.start()
        self._outgoing.start()
        taking = threading.Thread(target=lambda: asyncio.run(self._take_lanes()), name="lanes", daemon=True)
        taking.start()
        for interval, work in (
            (self._settings.lease / 3, self._renew),
            (_PAUSE, self._leases.release),
            (_SEEN, self._say_seen),
            (_REPORT, self._report_problems),
            (SWEEP, self._sweep),
            (SWEEP, self._outgoing.sweep),
            (_REGISTRY, self._follow),
            (_INDEX, self._index),
            (_FORGET, self._forget),
            (_HOURLY, self._make_partitions),
            (SCHEMA_POLL_INTERVAL, self._look_at_schema),
        ):
            threading.Thread(target=self._repeat, args=(interval, work), name=work.__name__, daemon=True).start()
        while not self._orders:
            time.sleep(_POLL_INTERVAL)
        self._end(taking)

    def _await_schema(self) -> None:
        """A schema that is behind is waited for; whoever waits for it does nothing else."""
        while not self._orders and not ((found := self._schema.check()) and found.compatible):
            time.sleep(SCHEMA_POLL_INTERVAL)

    def _look_at_schema(self) -> None:
        """A schema that has gone where this code cannot follow ends its work, in order; whoever starts it again waits."""
        found = self._schema.check()
        if found is not None and not found.compatible and not self._orders:
            self.stop()

    def _end(self, taking: threading.Thread) -> None:
        log.info("worker.stopping", worker=self.name)
        self._stopping.set()
        by = time.monotonic() + GRACE
        self._leases.leave(by)
        self._places.close()
        self._outgoing.stop()
        renew_at = 0.0
        while time.monotonic() < by + _PAUSE and not (
            self._places.closed() and self._outgoing.ended() and not taking.is_alive()
        ):
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._settings.lease / 3
                self._renew()
            if self._orders > 1 and by > time.monotonic():
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
        """Do it again and again; it may say how long to wait. The database's errors are told and waited out."""
        while not self._stopping.is_set():
            pause: float | None = None
            try:
                pause = work()
            except SQLAlchemyError as exc:
                log.warning("worker.database_error", part=work.__name__, error=describe(exc))
                pause = max(_PAUSE, min(interval, _UNLOADED_PAUSE))
            except Exception:
                log.exception("worker.failed", part=work.__name__)  # and goes on
            self._stopping.wait(interval if pause is None else pause)

    # --- handlers

    def _load(self, registry: Registry) -> None:
        """Load what is enabled, each plugin by itself, and see that the registry says what it declares.

        What cannot be loaded is reported, and treated as what is not installed: its deliveries wait.
        """
        importlib.invalidate_caches()
        enabled = {each.handler for destination in registry.destinations.values() for each in destination.subscriptions}
        plugins = discovery.load_handlers(enabled, self._settings.handlers)
        loaded = plugins.loaded
        problems = [of_failure(each, "plugin_not_loaded", each.handler or each.origin) for each in plugins.failures]
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
        self._reload_at = time.monotonic() + _RELOAD if problems else math.inf
        self._version = registry.version
        self._handlers = tuple(sorted(name for name, each in loaded.items() if each.declaration.role == "handler"))

    def _development_bindings(self, loaded: Mapping[str, Loaded]) -> Mapping[str, set[str]]:
        """Each development destination with the handlers that were ever bound to it."""
        if not any(each.development for each in loaded.values()):
            return {}
        with self._engine.connect() as connection:
            return maintenance.development_bindings(connection)

    def _register(self, each: Loaded, bindings: Mapping[str, set[str]]) -> list[HandlerProblem]:
        """Bind what a module of RECEIVER_HANDLERS holds to development destinations, once; and write down what the
        handler declares now. What the registry refuses is a problem of this handler alone.
        """
        name, problems = each.declaration.name, []
        for destination, names in bindings.items():
            if each.development and name not in names:
                try:
                    self._registration.enable_handler(destination, each.spec, datetime.now(UTC))
                except ReceiverError as exc:
                    problems.append(_conflict(name, destination, f"{name} ({each.origin}): {exc}"))
        # Once, not whenever it is changed: two workers with two versions of a plugin would never come to an end.
        if name not in self._refreshed:
            try:
                self._registration.refresh_handlers([each.spec], datetime.now(UTC))
                self._refreshed.add(name)
            except ReceiverError as exc:
                problems.append(_conflict(name, "", f"{name} ({each.origin}): {exc}"))
        return problems

    def _follow(self) -> None:
        """Load what was enabled since, and try again what could not be loaded."""
        registry = self._follower.current
        if registry is not None and (registry.version != self._version or time.monotonic() >= self._reload_at):
            self._load(registry)

    def _report_problems(self) -> None:
        self._problems.flush(self._leases.connection)

    # --- lanes

    async def _take_lanes(self) -> None:
        """Procrastinate on the handlers that are loaded; on others as soon as others are."""
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
        await asyncio.wrap_future(self._places.give(lane))

    def _run_lane(self, slot: HandlerSlot, lane: str) -> None:
        """In one of the places: run the lane until it is empty or waits, or others wait for the place."""
        try:
            if (handler := lanes.many(lane)) is not None:
                self._run_lanes(slot, handler)
                return
            while not self._stopping.is_set() and self._stay(slot, lane):
                with self._leases.connection() as connection:
                    if lanes.others_wait(connection, self._handlers):
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
        """This worker has loaded the handler, and the processes that should run it cannot."""
        handler = lane.partition("/")[0]
        if isinstance(exc, PluginError):
            self._problems.add(of_failure(exc.failure, "handler_not_started", handler))
        else:
            self._problems.add(
                HandlerProblem(
                    kind="handler_not_started", handler=handler, detail=str(exc), error_class=type(exc).__name__
                )
            )

    def _run_lanes(self, slot: HandlerSlot, handler: str) -> None:
        """Run many lanes, some at a time, until there is none; whoever is free is called to help."""
        leave_at = time.monotonic() + SLICE
        while not self._stopping.is_set() and (names := self._drains.next(handler)):
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
                leave_after=lane_scheduler.STAY,
                others=lambda: self._defer_many(handler),
                development=self._development(names[0]),
            )
            self._drains.took(handler, time.monotonic() - began)
            self._ran(handler, left)
            if left is not None and left.why == "dead":
                self._perhaps_pause(names[0], left)

    def _stay(self, slot: HandlerSlot, lane: str) -> bool:
        """Whether there may be more to run at once."""
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
        self._ran(subscription.handler, left)
        if left is not None and left.why == "dead":
            self._perhaps_pause(lane, left)
        return left is not None and left.why in ("time", "dead")

    def _ran(self, handler: str, left: LaneDone | None) -> None:
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
        """Whether the lane's destination is a development one."""
        registry = self._follower.current
        destination = None if registry is None else registry.destinations.get(lane.split("/", 2)[1])
        return destination is not None and destination.environment == "development"

    def _perhaps_pause(self, lane: str, left: LaneDone) -> None:
        """Many dead of one error are not the messages' fault: what is left stays pending, until somebody has looked."""
        handler, destination, _ = lane.split("/", 2)
        with self._leases.connection() as connection:
            count = lanes.recently_dead(connection, handler, destination, left.error_class)
        if count >= self._settings.pause_after_dead:
            log.error(
                "handler.paused", handler=handler, destination=destination, error_class=left.error_class, count=count
            )
            self._registration.pause_handler(
                handler, datetime.now(UTC), destination=destination, reason=f"many_dead:{left.error_class}"
            )

    # --- what is done beside, again and again

    def _renew(self) -> None:
        self._leases.renew(self._settings.lease)

    def _say_seen(self) -> None:
        with self._leases.connection() as connection:
            self._others = maintenance.seen(connection, self.name, socket.gethostname(), os.getpid(), self._handlers)

    def _sweep(self) -> float | None:
        """Look for lanes that nobody was told of; seldomer the more workers do."""
        with self._leases.connection() as connection:
            found, self._swept = lanes.due(connection, self._handlers, after=self._swept, limit=SWEEP_LANES)
            lanes.wake(connection, found)
        return SWEEP * (1 + self._others)

    def _defer(self, lane: str) -> None:
        try:
            with self._leases.connection() as connection:
                lanes.defer(connection, lane)
        except SQLAlchemyError as exc:
            if sqlstate(exc) != _DUPLICATE:
                raise

    def _defer_many(self, handler: str) -> None:
        try:
            with self._leases.connection() as connection:
                lanes.defer_many(connection, handler)
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
    """What the registry refuses of a handler's declaration."""
    return HandlerProblem(
        kind="plugin_not_loaded", handler=handler, destination=destination, error_class="Conflict", detail=sentence
    )
