"""The command `up`: runs the database, the receiver, the admin listener and the delivery workers until a stop signal.

Must not receive or deliver messages itself: it starts the processes that do, and restarts them.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

import click
import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver import logs, settings_variables
from receiver import settings as table
from receiver.cli import session
from receiver.cli.commands.serve import database_url, settings_help, settle_paths
from receiver.cli.options import example
from receiver.cli.up.child_processes import POLL_INTERVAL, Child, ChildSpec, stop
from receiver.cli.up.listening import PORT_TIMEOUT, listen
from receiver.cli.up.postgres import PostgresSupervisor, prepare_own_database
from receiver.cli.up.readiness import at_work, await_ready, database_time
from receiver.cli.up.stop_signal import StopSignal, stop_signal
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError
from receiver.fault_injection import enable
from receiver.settings import Settings
from receiver.storage import schema

log: Final = structlog.get_logger(__name__)

# Seconds that a part has to stop: gunicorn gives its own processes 30 s.
DRAIN: Final = 40.0


@click.command(epilog=example("up", "up --data-dir /srv/redox --bind 0.0.0.0:8080 --receivers 4 --workers 2"))
@click.option(
    "--bind",
    metavar="HOST:PORT",
    help="Address of the public listener. Port 0 takes a free one." + settings_help("bind"),
)
@click.option(
    "--admin-bind",
    metavar="HOST:PORT",
    help="Address of the admin listener. Keep it on loopback." + settings_help("admin_bind"),
)
@click.option("--receivers", type=int, metavar="N", help="Number of receiver processes." + settings_help("receivers"))
@click.option("--workers", type=int, metavar="N", help="Number of delivery workers." + settings_help("workers"))
def up(bind: str | None, admin_bind: str | None, receivers: int | None, workers: int | None) -> None:
    """Run all parts on one machine, until Ctrl-C or SIGTERM.

    Without DATABASE_URL it also runs PostgreSQL in the data directory. The first start creates the database and a
    keyring. Prints `ready http://HOST:PORT` on stdout when it serves; the log goes to stderr.
    """
    for field, value in (("bind", bind), ("admin_bind", admin_bind), ("receivers", receivers), ("workers", workers)):
        if value is not None:
            os.environ[table.variable(field)] = str(value)
    settings = table.load_settings()
    settle_paths(settings)
    logs.configure(settings.log_level)
    with stop_signal() as orders, ExitStack() as stack:
        cluster = None
        timeout = 0.0
        if settings.database_url is None:
            cluster = Cluster(settings.data_dir, account=settings.postgres_account)
            cluster.check_unowned()
            timeout = PORT_TIMEOUT if cluster.running() else 0.0  # still running after an `up` was killed
        # Before anything is created or started: a port in use is the most common mistake.
        public = stack.enter_context(listen(settings.bind, "bind", timeout))
        admin = stack.enter_context(listen(settings.admin_bind, "admin_bind", timeout))
        if cluster is not None:
            stack.enter_context(cluster.own())
            prepare_own_database(settings)
        else:
            with session.opened():
                pass  # only checks settings, keyring and schema
        enable.enable_faults(database_url(settings))
        _run(settings, public, admin, cluster, orders)
    log.info("up.stopped")


def _run(
    settings: Settings, public: socket.socket, admin: socket.socket, cluster: Cluster | None, orders: StopSignal
) -> None:
    receiver = Child(_part("receiver", ["serve", "--fd", str(public.fileno())], public))
    workers = [Child(_part(f"worker-{number}", ["worker"])) for number in range(1, settings.workers + 1)]
    others = [Child(_part("admin", ["admin", "--fd", str(admin.fileno())], admin)), *workers]
    children = [receiver, *others]
    try:
        with session.database(settings) as engine:
            began = database_time(engine)
            for child in children:
                child.start()
            await_ready(children, settings, public, admin, orders, lambda: at_work(engine, workers, began))
            _warn_without_destination(engine, settings)
        postgres = PostgresSupervisor(cluster)
        while not orders.stop:
            postgres.keep()
            if orders.renew:
                orders.renew = False
                _renew(children, settings)
            for child in children:
                child.keep()
            time.sleep(POLL_INTERVAL)
    finally:
        # Stop the receiver first: messages that arrive while the workers stop would only wait. Close our copies of the
        # listening sockets, or the kernel would accept connections that no process serves.
        log.info("up.stopping")
        public.close()
        admin.close()
        for group in ([receiver], others):
            stop(group, hurried=lambda: orders.hurry)


def _warn_without_destination(engine: Engine, settings: Settings) -> None:
    """If no destination exists, log the command that adds one: until then every request is refused."""
    with suppress(SQLAlchemyError), engine.connect() as connection:
        if connection.scalar(select(func.count()).select_from(schema.destinations)) == 0:
            where = "" if settings.database_url else f" --data-dir {shlex.quote(str(settings.data_dir))}"
            log.warning(
                "up.no_destination",
                error="no destination exists yet, so every request is refused: run "
                f"`redox-receiver destination add NAME{where}` in another terminal",
            )


# Settings that `up` reads only at its start.
_AT_START: Final = ("database_url", "data_dir", "postgres_account", "bind", "admin_bind", "workers")


def _renew(children: Sequence[Child], began: Settings) -> None:
    """Reload the settings in all children, if the settings are valid. The number of children stays the same."""
    try:
        settings = table.load_settings()
        keyrings.load_keyring(settings.keyring_path)
    except ConfigurationError as exc:
        log.error("up.settings_refused", error="; ".join(str(exc).splitlines()))
        return
    log.info("up.settings_read")
    settings_variables.warn_of_unread()
    kept = [table.variable(name) for name in _AT_START if getattr(settings, name) != getattr(began, name)]
    if kept:
        log.warning(
            "up.restart_needed",
            error=f"{', '.join(kept)} changed: restart `up` to apply this. Until then it uses the previous value",
        )
    for child in children:
        if child.part.name in ("receiver", "admin"):
            child.signal(signal.SIGHUP)  # gunicorn replaces its workers
        else:
            child.renew()


def _part(name: str, command: Sequence[str], listener: socket.socket | None = None) -> ChildSpec:
    # -P: Python does not import modules from the current directory.
    return ChildSpec(
        name=name,
        command=[sys.executable, "-P", "-m", "receiver", *command],
        timeout=DRAIN,
        descriptors=() if listener is None else (listener.fileno(),),
    )
