"""Background tasks of a worker: heartbeats, the sweep for due lanes, the patient index, seals, expired rows,
partitions.

Must not run deliveries. Each task runs in a thread of its own, so that none delays another.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Final

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.keyring import Keyring
from receiver.storage.accept import replay_guard
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.evidence.outcome_records import MOST as MOST_RECORDED
from receiver.storage.evidence.outcome_records import OutcomeRecorder
from receiver.storage.evidence.seals import MOST as MOST_SEALED
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.queue import maintenance, partitions, wake_ups
from receiver.worker.handler_loader import HandlerLoader
from receiver.worker.leases import Leases

log: Final = structlog.get_logger(__name__)

# Seconds between sweeps for due lanes without a notification, over all workers together; and the lanes per sweep.
SWEEP: Final = 1.0
SWEEP_LANES: Final = 500
# Seconds between: heartbeats, patient indexing when there was none, removal of expired keys, new partitions.
_HEARTBEAT_INTERVAL: Final = 5.0
_INDEX_INTERVAL: Final = 1.0
_FORGET_INTERVAL: Final = 60.0
_PARTITION_INTERVAL: Final = 3600.0
# Seconds between two seals of the audit log: a row is sealed at the latest after this and the commit of a seal.
_SEAL_INTERVAL: Final = 2.0
# Seconds to wait after an error of the database: at least, and at most.
_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 10.0


def repeat(interval: float, work: Callable[[], float | None], stopping: threading.Event) -> None:
    """Call `work` every `interval` seconds in a thread, until `stopping` is set. It may return the seconds to wait.

    Database errors are logged and retried.
    """

    def run() -> None:
        while not stopping.is_set():
            pause: float | None = None
            try:
                pause = work()
            except SQLAlchemyError as exc:
                log.warning("worker.database_error", part=work.__name__, error=describe(exc))
                pause = max(_PAUSE, min(interval, _LONGEST_PAUSE))
            except Exception:
                log.exception("worker.failed", part=work.__name__)  # and continue
            stopping.wait(interval if pause is None else pause)

    threading.Thread(target=run, name=work.__name__, daemon=True).start()


class BackgroundTasks:
    """The background tasks of one worker."""

    def __init__(self, engine: Engine, keyring: Keyring, leases: Leases, handlers: HandlerLoader) -> None:
        self._engine = engine
        self._leases = leases
        self._handlers = handlers
        self._keyring = keyring
        self._seals = Sealer(keyring)
        self._digests = KeyedDigests(keyring)
        self._sealer = AuditSealer(engine, keyring)
        self._outcomes = OutcomeRecorder(engine, keyring, actor=f"worker:{leases.owner}")
        self._others = 0  # live workers that have loaded some of the same handlers
        self._swept = ""  # the cursor of the sweep
        self._closed: set[int] = set()  # messages whose payload cannot be decrypted here

    def start(self, stopping: threading.Event) -> None:
        """Start the tasks. They end when `stopping` is set."""
        repeat(_HEARTBEAT_INTERVAL, self._heartbeat, stopping)
        repeat(SWEEP, self._sweep, stopping)
        repeat(_INDEX_INTERVAL, self._index, stopping)
        repeat(_FORGET_INTERVAL, self._forget, stopping)
        repeat(_PARTITION_INTERVAL, self._make_partitions, stopping)
        repeat(_SEAL_INTERVAL, self._seal, stopping)

    def _heartbeat(self) -> None:
        self._keyring.refresh()
        held = [key.id for key in self._keyring.keys]
        with self._leases.connection() as connection:
            self._others = maintenance.seen(
                connection, self._leases.owner, socket.gethostname(), os.getpid(), self._handlers.names, held
            )

    def _sweep(self) -> float | None:
        """Look for due lanes without a notification. The more workers there are, the less often each one looks."""
        with self._leases.connection() as connection:
            found, self._swept = wake_ups.due(connection, self._handlers.names, after=self._swept, limit=SWEEP_LANES)
            wake_ups.wake(connection, found)
        return SWEEP * (1 + self._others)

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

    def _seal(self) -> float | None:
        """Record the outcomes of deliveries, and seal the audit rows that have committed, unless another host does."""
        recorded = self._outcomes.record()
        made = self._sealer.seal()
        more = recorded >= MOST_RECORDED or (made is not None and made.added >= MOST_SEALED)
        return 0.0 if more else None

    def _make_partitions(self) -> None:
        with self._engine.begin() as connection:
            made = partitions.ensure(connection, maintenance.now(connection))
            maintenance.forget_activity(connection)
        if made:
            log.info("partitions.made", count=len(made))
