"""The delivery worker: claims lanes, runs their deliveries in handler processes, and does the background work.

`lane_worker` takes the lanes that the job queue brings; `lane_run` claims each, has a handler process run it, and
finishes it. Must not import or run a handler itself. Any number of workers on any hosts share one
database. Each worker takes the lanes of the handlers that it has loaded.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver.database.compatibility import SCHEMA_POLL_INTERVAL, SchemaMonitor
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import describe, open_engine
from receiver.fault_injection import enable
from receiver.settings import Settings
from receiver.storage.queue import maintenance
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.follower import RegistryFollower
from receiver.worker.background_tasks import SWEEP, BackgroundTasks, repeat
from receiver.worker.handler_loader import HandlerLoader
from receiver.worker.handler_process.bootstrap import process_name
from receiver.worker.lane_worker import LaneWorker
from receiver.worker.leases import Leases
from receiver.worker.outbox_worker import SENDERS, OutboxWorker
from receiver.worker.problem_reporter import ProblemReporter

log: Final = structlog.get_logger(__name__)

# Seconds that a running handler may continue after the worker was asked to stop. Another worker runs the rest of its
# lane.
GRACE: Final = 30.0
# Seconds between: registry updates, reports of changed handler problems, attempts to release lanes.
_REGISTRY_INTERVAL: Final = 0.5
_REPORT_INTERVAL: Final = 1.0
_RELEASE_INTERVAL: Final = 1.0
# Seconds between checks for a stop request.
_POLL_INTERVAL: Final = 0.1
# Seconds. The limit for the worker's own statements.
_STATEMENT_TIMEOUT: Final = 10.0


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
        keyring = keyrings.load_keyring(settings.keyring_path)
        # One connection for each lane that is claimed or released, and one for each background thread.
        engine = open_engine(
            self._url, pool_size=settings.concurrency + SENDERS + 11, statement_timeout=_STATEMENT_TIMEOUT
        )
        self._schema = SchemaMonitor(engine)
        self._registry = RegistryFollower(engine, keyring)
        changes = RegistryChanges(engine, keyring, actor=f"worker:{self.name}")
        self._leases = Leases(engine, self.name)
        self._problems = ProblemReporter(self.name)
        self._handlers = HandlerLoader(engine, changes, self._problems, settings.handlers)
        self._stop_requests = 0
        self._stopping = threading.Event()
        self._lanes = LaneWorker(
            settings,
            self._url,
            self._leases,
            handlers=self._handlers,
            registry=lambda: self._registry.current,
            changes=changes,
            problems=self._problems,
            stopping=self._stopping,
        )
        self._outbox = OutboxWorker(self._url, keyring, self._leases, lease=settings.lease, rate=settings.redox_rate)
        self._background = BackgroundTasks(engine, keyring, self._leases, self._handlers)

    def stop(self) -> None:
        """Stop in order; at the second call, at once. Safe in signal handlers: it only increments a counter."""
        self._stop_requests += 1

    def run(self) -> None:
        """Work until `stop`."""
        enable.enable_faults(self._url)
        self._await_schema()
        self._await_registry()
        self._follow_registry()
        log.info("worker.started", worker=self.name, handlers=list(self._handlers.names))
        self._lanes.start()
        self._outbox.start()
        self._background.start(self._stopping)
        repeat(self._settings.lease / 3, self._renew, self._stopping)
        repeat(_RELEASE_INTERVAL, self._leases.release, self._stopping)
        repeat(_REPORT_INTERVAL, self._report_problems, self._stopping)
        repeat(_REGISTRY_INTERVAL, self._follow_registry, self._stopping)
        repeat(SWEEP, self._outbox.sweep, self._stopping)
        repeat(SCHEMA_POLL_INTERVAL, self._check_schema, self._stopping)
        while not self._stop_requests:
            time.sleep(_POLL_INTERVAL)
        self._end()

    def _await_schema(self) -> None:
        """Wait until the database schema is compatible. Nothing else runs meanwhile."""
        while not self._stop_requests and not ((found := self._schema.check()) and found.compatible):
            time.sleep(SCHEMA_POLL_INTERVAL)

    def _await_registry(self) -> None:
        self._registry.start()
        while self._registry.current is None and not self._stop_requests:
            time.sleep(_POLL_INTERVAL)

    def _check_schema(self) -> None:
        """Check the schema. If it is no longer compatible, stop in order: the restarted worker waits for a compatible
        schema.
        """
        found = self._schema.check()
        if found is not None and not found.compatible and not self._stop_requests:
            self.stop()

    def _follow_registry(self) -> None:
        self._handlers.follow(self._registry.current)

    def _report_problems(self) -> None:
        self._problems.flush(self._leases.connection)

    def _renew(self) -> None:
        self._leases.renew(self._settings.lease)

    def _end(self) -> None:
        log.info("worker.stopping", worker=self.name)
        self._stopping.set()
        by = time.monotonic() + GRACE
        self._leases.leave(by)
        self._lanes.close()
        self._outbox.stop()
        renew_at = 0.0
        while time.monotonic() < by + _RELEASE_INTERVAL and not (self._lanes.ended() and self._outbox.ended()):
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._settings.lease / 3
                self._renew()
            if self._stop_requests > 1 and by > time.monotonic():
                by = time.monotonic()
                self._leases.leave(by)
            time.sleep(_POLL_INTERVAL)
        self._registry.stop()
        self._sign_off()
        log.info("worker.stopped", worker=self.name)

    def _sign_off(self) -> None:
        """Release the lanes, and remove this worker and its problems from the database."""
        try:
            self._leases.release()
            self._problems.withdraw(self._leases.connection)
            with self._leases.connection() as connection:
                maintenance.gone(connection, self.name)
        except SQLAlchemyError as exc:
            log.warning("worker.sign_off_failed", error=describe(exc))
