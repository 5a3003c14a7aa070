"""SIGHUP: starts workers with the new configuration, and stops the old ones once all new ones serve.

gunicorn alone reads the new configuration and ends if it is not valid. It stops its old workers before the new ones
have booted, and ends if one of them does not boot. Here the old workers serve until all new ones do, including database
and keys; one log line says what is wrong. SIGHUP reads the settings and the keyring again, not the program: a new
release needs a restart, and so does another address to listen on.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable
from queue import Empty
from typing import Any, Final

import structlog
from gunicorn.errors import HaltServer  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver import keyring as keyrings
from receiver import settings as table
from receiver import settings_variables
from receiver.errors import ReceiverError

log: Final = structlog.get_logger(__name__)

# Seconds that the new workers have until all of them serve.
READY_TIMEOUT: Final = 60.0
_POLL_INTERVAL: Final = 0.05
_CONFIGURATION: Final = "receiver.server.conf"
_STOPPING: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Reload:
    """Replaces the method `reload` of a gunicorn arbiter."""

    def __init__(self, arbiter: Any) -> None:
        self._arbiter = arbiter

    def __call__(self) -> None:
        """Replace the workers by ones with the present configuration; or log why not, and keep them."""
        arbiter, before = self._arbiter, (self._arbiter.app.cfg, self._arbiter.app.app_uri)
        try:
            keyrings.load_keyring(table.load_settings().keyring_path)
            # Python imports a module once: without this, the old configuration would stay.
            sys.modules.pop(_CONFIGURATION, None)
            arbiter.app.reload()
        except (ReceiverError, SystemExit) as exc:
            arbiter.app.cfg, arbiter.app.app_uri = before
            log.error("receiver.not_reloaded", error="; ".join(str(exc).splitlines()))
            return
        settings_variables.warn_of_unread()
        if arbiter.app.cfg.address != before[0].address:
            log.warning("receiver.address_kept", error="another address to listen on needs a restart")
        arbiter.setup(arbiter.app)
        if self._replace():
            log.info("receiver.reloaded", count=arbiter.num_workers)
        else:
            arbiter.app.cfg, arbiter.app.app_uri = before
            arbiter.setup(arbiter.app)

    def _replace(self) -> bool:
        """Replace the workers; return whether that succeeded."""
        arbiter = self._arbiter
        old = list(arbiter.WORKERS)
        worker_class = arbiter.worker_class
        worker_class.replaces = True
        try:
            for _ in range(arbiter.num_workers):
                arbiter.spawn_worker()
        finally:
            worker_class.replaces = False
        fresh = [worker for pid, worker in arbiter.WORKERS.items() if pid not in old]
        failure = self._failure(fresh)
        if failure is None:
            self._end(old)
            return True
        log.error("receiver.not_reloaded", error=failure)
        self._end([worker.pid for worker in fresh])
        for worker in fresh:
            worker.tmp.close()
        return False

    def _failure(self, fresh: Iterable[Any]) -> str | None:
        """Wait until all new workers serve. Return the reason if they do not."""
        by = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                self._arbiter.reap_workers()
            except HaltServer:
                return "a new worker does not boot: the line above says why; the old workers continue"
            if any(worker.pid not in self._arbiter.WORKERS for worker in fresh):
                return "a new worker ended: the old workers continue"
            # A worker's file has the wall-clock time of its creation until its first heartbeat.
            if all(worker.tmp.last_update() <= time.monotonic() for worker in fresh):
                return None
            if time.monotonic() > by:
                return (
                    f"the new workers did not serve within {READY_TIMEOUT:g} s, because the database or its keys are "
                    "missing: the old workers continue"
                )
            if self._stop_requested():
                return "a signal to stop arrived"
            time.sleep(_POLL_INTERVAL)

    def _stop_requested(self) -> bool:
        """Whether a signal to stop waits in gunicorn's queue. All signals stay in the queue."""
        queue, waiting = self._arbiter.SIG_QUEUE, []
        try:
            while True:
                waiting.append(queue.get_nowait())
        except Empty:
            for each in waiting:
                queue.put_nowait(each)
        return any(each in _STOPPING for each in waiting)

    def _end(self, pids: Iterable[int]) -> None:
        """Stop these workers gracefully; kill those that take longer than `graceful_timeout`."""
        arbiter, left = self._arbiter, set(pids)
        by = time.monotonic() + arbiter.cfg.graceful_timeout
        for pid in left:
            arbiter.kill_worker(pid, signal.SIGTERM)
        while left := left & arbiter.WORKERS.keys():
            if time.monotonic() > by:
                for pid in left:
                    arbiter.kill_worker(pid, signal.SIGKILL)
            try:
                arbiter.reap_workers()
            except HaltServer:
                continue  # another that did not boot
            time.sleep(_POLL_INTERVAL)
