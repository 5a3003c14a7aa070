"""Whether all parts that `up` started do their work."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

import click
import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from receiver.cli.up.child_processes import POLL_INTERVAL, Child
from receiver.cli.up.listening import address_of, answers
from receiver.cli.up.stop_signal import StopSignal
from receiver.errors import ConfigurationError
from receiver.settings import Settings
from receiver.storage import schema

log: Final = structlog.get_logger(__name__)

# Seconds without readiness between two warnings.
_NOT_READY: Final = 60.0


def await_ready(
    children: Sequence[Child],
    settings: Settings,
    public: socket.socket,
    admin: socket.socket,
    orders: StopSignal,
    workers_ready: Callable[[], bool],
) -> None:
    """Wait until the listeners answer and `workers_ready` is true, and print the `ready` line.

    The receiver does not depend on the workers: once a worker ends, it is restarted and the wait no longer includes
    workers. Raises ConfigurationError when another part ends.
    """
    worker_ended = False
    due = time.monotonic() + _NOT_READY
    while not orders.stop:
        for child in children:
            if child.part.name.startswith("worker-"):
                before = child.pid
                child.keep()
                worker_ended |= child.pid != before
            elif (status := child.ended()) is not None:
                raise ConfigurationError(
                    f"{child.part.name} did not start (exit status {status}): see the log above "
                    "for the cause, and run `redox-receiver check` for the fix"
                )
        if answers(public, "/livez") and answers(admin, "/readyz") and (worker_ended or workers_ready()):
            log.info("up.ready", bind=address_of(settings.bind, public), part="receiver")
            log.info("up.ready", bind=address_of(settings.admin_bind, admin), part="admin")
            click.echo(f"ready http://{address_of(settings.bind, public)}")
            return
        if time.monotonic() > due:
            log.warning("up.not_ready", seconds=_NOT_READY)
            due += _NOT_READY
        time.sleep(POLL_INTERVAL)


def database_time(engine: Engine) -> datetime:
    """The time of the database, which the workers use for their heartbeats."""
    with engine.connect() as connection:
        return connection.execute(select(func.now())).scalar_one()


def at_work(engine: Engine, workers: Sequence[Child], since: datetime) -> bool:
    """Return whether each worker has loaded its handlers and sent a heartbeat since `since`."""
    table = schema.workers
    try:
        with engine.connect() as connection:
            seen = set(
                connection.scalars(
                    select(table.c.pid).where(table.c.host == socket.gethostname(), table.c.seen_at >= since)
                )
            )
    except SQLAlchemyError:
        return False
    return all(worker.pid in seen for worker in workers)
