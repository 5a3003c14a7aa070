"""Procrastinate, which brings lanes to workers: a job stands for a lane that is ready now.

May not decide anything: a job that is lost, ended or there twice costs a moment, for the rows of `lanes` and
`deliveries` are the truth, and a lane is its lease's. So a job is never retried; and one whose worker is gone is ended,
for as long as it stands no other job of its lane may run.
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

# Procrastinate looks for jobs when it is notified of one, and every so often: a job that waits for another of its lane
# is not notified again when that ends.
_POLL: Final = 0.25
# How often a worker says that it lives, and after how long without a word it is gone, in leases: below one, so that a
# lane is free when its lease ends.
_HEARTBEAT: Final = 1 / 6
_SILENT: Final = 2 / 3
# How often stalled jobs are looked for.
_STALLED_INTERVAL: Final = 1 / 10
# After the engine has ended by itself: it does whenever the database does not answer.
_PAUSE: Final = 1.0
_CONNECT_TIMEOUT: Final = 5.0
# Running lanes go on without their jobs when the engine ends: they have their leases.
_SHUTDOWN: Final = 0.1

Run = Callable[[str], Awaitable[None]]


class JobQueue:
    """Takes lanes of `handlers` and has `run` run them, `concurrency` at a time; begun again when it ends by itself.

    `lease`: seconds that a lane stays with a worker that has fallen silent.
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
        self._workers: set[int] = set()  # Procrastinate's numbers for this process, the last one and those before
        self._suspects: set[int] = set()  # jobs that this process should be running, and does not

    async def serve(self) -> None:
        """Until cancelled."""
        logging.getLogger("procrastinate").setLevel(logging.ERROR)  # what it says of itself is told here
        while True:
            try:
                await self._serve()
            except (ConnectorException, psycopg.Error, OSError) as exc:
                log.warning("engine.ended", error=type(exc).__name__, again_in=_PAUSE)
            except Exception as exc:  # noqa: BLE001 - whatever it is, lanes must go on
                log.error("engine.failed", error=type(exc).__name__, again_in=_PAUSE)
            await asyncio.sleep(_PAUSE)

    async def _serve(self) -> None:
        arguments: dict[str, Any] = connect_arguments(None, search_path="procrastinate")
        address = normalise(self._url).set(drivername="postgresql").render_as_string(hide_password=False)
        # First a connection alone: a pool that cannot connect waits longer and longer between its attempts.
        await (await psycopg.AsyncConnection.connect(address, **arguments)).close()
        app = App(
            connector=PsycopgConnector(
                conninfo=address, kwargs=arguments, min_size=1, max_size=4, timeout=_CONNECT_TIMEOUT
            )
        )
        app.task(name="lane", pass_context=True)(self._lane)
        async with app.open_async():
            for worker in self._workers:
                await app.job_manager.unregister_worker(worker)  # of an engine of ours that ended: its jobs are stalled
            self._workers.clear()
            mending = asyncio.create_task(self._end_stalled(app))
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
                mending.cancel()

    async def _lane(self, context: JobContext, lane: str) -> None:
        """The one task. Raises nothing, and returns nothing, for Procrastinate would log it."""
        job = context.job
        assert job.id is not None
        self._running.add(job.id)
        if job.worker_id is not None:
            self._workers.add(job.worker_id)
        try:
            await self._run(lane)
        except Exception as exc:  # noqa: BLE001 - see above; the lane is found again
            log.error("lane.failed", lane=lane, error=type(exc).__name__)
        finally:
            self._running.discard(job.id)

    async def _end_stalled(self, app: App) -> None:
        """End jobs that nobody runs any more."""
        while True:
            try:
                for job in await self._stalled(app):
                    await _end(app, job)
            except (ConnectorException, psycopg.Error) as exc:
                log.debug("engine.not_mended", error=type(exc).__name__)
            await asyncio.sleep(self._lease * _STALLED_INTERVAL)

    async def _stalled(self, app: App) -> list[Job]:
        """Those of workers that are gone; and ours that ended while the database was away, so that it was not told."""
        stalled = list(await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=self._lease * _SILENT))
        ours = [
            job
            for worker in self._workers
            for job in await app.job_manager.list_jobs_async(status=Status.DOING.value, worker_id=worker)
            if job.id not in self._running
        ]
        # Twice in a row: one that was just taken, or has just ended, is neither running nor stalled.
        stalled += [job for job in ours if job.id in self._suspects]
        self._suspects = {job.id for job in ours if job.id is not None}
        return stalled


async def _end(app: App, job: Job) -> None:
    try:
        await app.job_manager.finish_job(job, Status.FAILED, delete_job=True)
    except ConnectorException:
        return  # another worker was quicker
    log.info("engine.stalled_job_ended", lane=job.lock)
