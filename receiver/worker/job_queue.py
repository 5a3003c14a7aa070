"""The job queue: Procrastinate brings lanes to workers. A job means that a lane is ready now.

Must not decide anything: the rows of `lanes` and `deliveries` are authoritative, and the lease decides which process
runs a lane. A lost, failed or duplicate job costs only a short delay. So jobs are never retried. The job of a dead
worker is ended, because it blocks every other job of its lane.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import psycopg
import structlog
from procrastinate import App, JobContext, PsycopgConnector
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job, Status

from receiver.database.engine import connect_arguments, normalise

log: Final = structlog.get_logger(__name__)

# Seconds. Procrastinate polls for jobs in addition to notifications: there is no notification when a job becomes ready
# because the previous job of its lane has ended.
_POLL: Final = 0.25
# How often a worker sends a heartbeat, and after how long without one it counts as dead, as fractions of a lease. Below
# 1, so that the lane is free when its lease ends.
_HEARTBEAT: Final = 1 / 6
_SILENT: Final = 2 / 3
# Seconds between searches for stalled jobs.
_STALLED_INTERVAL: Final = 1 / 10
# Seconds to wait after the engine has stopped by itself. It stops whenever the database does not answer.
_PAUSE: Final = 1.0
_CONNECT_TIMEOUT: Final = 5.0
# Lanes keep running without their jobs when the engine stops, because they have leases.
_SHUTDOWN: Final = 0.1

Run = Callable[[str], Awaitable[None]]


class JobQueue:
    """Takes lanes of `handlers` and passes them to `run`, `concurrency` at a time. Restarts the engine if it stops by
    itself.

    `lease`: seconds that a lane stays with a worker that has stopped responding.
    """

    def __init__(
        self, url: str, handlers: Sequence[str], run: Run, *, concurrency: int, name: str, lease: float
    ) -> None:
        self._url = url
        self._handlers = list(handlers)
        self._run = run
        self._concurrency = concurrency
        self._name = name
        self._lease = lease
        self._running: set[int] = set()  # jobs that this process runs
        self._workers: set[int] = set()  # Procrastinate's worker ids of this process: the current one and earlier ones
        self._suspects: set[int] = set()  # jobs that this process should run and does not

    async def serve(self) -> None:
        """Run until cancelled."""
        logging.getLogger("procrastinate").setLevel(logging.ERROR)  # this module logs its errors
        while True:
            try:
                await self._serve()
            except (ConnectorException, psycopg.Error, OSError) as exc:
                log.warning("engine.ended", error=type(exc).__name__, again_in=_PAUSE)
            except Exception as exc:  # noqa: BLE001 - lanes must continue whatever the error is
                log.error("engine.failed", error=type(exc).__name__, again_in=_PAUSE)
            await asyncio.sleep(_PAUSE)

    async def _serve(self) -> None:
        arguments: dict[str, Any] = connect_arguments(None, search_path="procrastinate")
        address = normalise(self._url).set(drivername="postgresql").render_as_string(hide_password=False)
        # Try a single connection first: a pool that cannot connect waits longer after each attempt.
        await (await psycopg.AsyncConnection.connect(address, **arguments)).close()
        app = App(
            connector=PsycopgConnector(
                conninfo=address, kwargs=arguments, min_size=1, max_size=4, timeout=_CONNECT_TIMEOUT
            )
        )
        app.task(name="lane", pass_context=True)(self._lane)
        async with app.open_async():
            for worker in self._workers:
                await app.job_manager.unregister_worker(
                    worker
                )  # of an earlier engine of this process: its jobs are stalled
            self._workers.clear()
            cleanup = asyncio.create_task(self._end_stalled(app))
            try:
                await app.run_worker_async(
                    queues=self._handlers,
                    concurrency=self._concurrency,
                    name=self._name,
                    delete_jobs="always",
                    install_signal_handlers=False,
                    fetch_job_polling_interval=_POLL,
                    abort_job_polling_interval=3600.0,
                    shutdown_graceful_timeout=_SHUTDOWN,
                    update_heartbeat_interval=self._lease * _HEARTBEAT,
                    stalled_worker_timeout=self._lease * _SILENT,
                )
            finally:
                cleanup.cancel()

    async def _lane(self, context: JobContext, lane: str) -> None:
        """The only task. Raises nothing and returns nothing, because Procrastinate would log it."""
        job = context.job
        assert job.id is not None
        self._running.add(job.id)
        if job.worker_id is not None:
            self._workers.add(job.worker_id)
        try:
            await self._run(lane)
        except Exception as exc:  # noqa: BLE001 - see above; the sweep finds the lane again
            log.error("lane.failed", lane=lane, error=type(exc).__name__)
        finally:
            self._running.discard(job.id)

    async def _end_stalled(self, app: App) -> None:
        """End jobs that no process runs any more."""
        while True:
            try:
                for job in await self._stalled(app):
                    await _end(app, job)
            except (ConnectorException, psycopg.Error) as exc:
                log.debug("engine.stalled_jobs_not_ended", error=type(exc).__name__)
            await asyncio.sleep(self._lease * _STALLED_INTERVAL)

    async def _stalled(self, app: App) -> list[Job]:
        """Find the jobs of dead workers, and jobs of this process that ended while the database was unavailable."""
        stalled = list(await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=self._lease * _SILENT))
        ours = [
            job
            for worker in self._workers
            for job in await app.job_manager.list_jobs_async(status=Status.DOING.value, worker_id=worker)
            if job.id not in self._running
        ]
        # Required twice in a row: a job that was just taken or has just ended can look stalled for a moment.
        stalled += [job for job in ours if job.id in self._suspects]
        self._suspects = {job.id for job in ours if job.id is not None}
        return stalled


async def _end(app: App, job: Job) -> None:
    try:
        await app.job_manager.finish_job(job, Status.FAILED, delete_job=True)
    except ConnectorException:
        return  # another worker ended it first
    log.info("engine.stalled_job_ended", lane=job.lock)
