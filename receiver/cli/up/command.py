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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
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
from receiver.cli.up.child_processes import POLL_INTERVAL, Child, Part, stop
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError, ReceiverError
from receiver.fault_injection import enable
from receiver.settings import Settings
from receiver.storage import schema
from receiver.storage.registry.key_records import check_keys, record_keys

log: Final = structlog.get_logger(__name__)

# Seconds that a part has to stop: gunicorn gives its own processes 30 s.
DRAIN: Final = 40.0

# Seconds between two checks of PostgreSQL, and before the next start after a failed one.
POSTGRES_POLL_INTERVAL: Final = 1.0
POSTGRES_PAUSE: Final = 10.0

# Seconds to wait for a port that processes of a killed `up` may still hold.
PORT_TIMEOUT: Final = 45.0

# The listen backlog, as in gunicorn: connections that wait while the receiver restarts.
BACKLOG: Final = 2048

# Seconds without readiness between two warnings.
_NOT_READY: Final = 60.0


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
    with _stop_signal() as orders, ExitStack() as stack:
        cluster = None
        timeout = 0.0
        if settings.database_url is None:
            cluster = Cluster(settings.data_dir, account=settings.postgres_account)
            cluster.check_unowned()
            timeout = PORT_TIMEOUT if cluster.running() else 0.0  # still running after an `up` was killed
        # Before anything is created or started: a port in use is the most common mistake.
        public = stack.enter_context(_listen(settings.bind, "bind", timeout))
        admin = stack.enter_context(_listen(settings.admin_bind, "admin_bind", timeout))
        if cluster is not None:
            stack.enter_context(cluster.own())
            prepare_own_database(settings)
        else:
            with session.opened():
                pass  # only checks settings, keyring and schema
        enable.enable_faults(database_url(settings))
        _run(settings, public, admin, cluster, orders)
    log.info("up.stopped")


def prepare_own_database(settings: Settings) -> None:
    """Migrate the embedded database to this release, and create its keyring if both are new.

    Raises ConfigurationError when the keyring is missing, or does not match the database.
    """
    with session.database(settings) as engine:
        migrations.upgrade(engine)
        with engine.begin() as connection:
            new = connection.scalar(select(func.count()).select_from(schema.keys)) == 0
            if new and not settings.keyring_path.exists():
                keyrings.create(datetime.now(UTC)).save(settings.keyring_path)
                log.info("up.keyring_made", path=str(settings.keyring_path))
            keyring = keyrings.load_keyring(settings.keyring_path)
            if new:
                record_keys(connection, keyring)
            check_keys(connection, keyring)


class StopSignal:
    """The requests that `up` received as signals."""

    def __init__(self) -> None:
        self.count = 0
        self.renew = False  # reload the settings; reset by the code that reloads them

    @property
    def stop(self) -> bool:
        """Stop gracefully."""
        return self.count > 0

    @property
    def hurry(self) -> bool:
        """Stop at once: the signal came twice."""
        return self.count > 1


@contextmanager
def _stop_signal() -> Iterator[StopSignal]:
    """Record SIGTERM, SIGINT and SIGHUP while the block runs. They do not interrupt it.

    With a terminal, SIGHUP means that the terminal was closed, and stops `up`. Without one, it reloads the settings. A
    signal that was ignored at start (nohup) stays ignored.
    """
    orders = StopSignal()
    terminal = _has_terminal()

    def take(number: int, _frame: object) -> None:
        if number == signal.SIGHUP and not terminal:
            orders.renew = True
        else:
            orders.count += 1

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for each, how in before.items():
        if how is not signal.SIG_IGN:
            signal.signal(each, take)
    try:
        yield orders
    finally:
        for each, how in before.items():
            signal.signal(each, how)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextmanager
def _listen(bind: str, field: str, timeout: float) -> Iterator[socket.socket]:
    """A listening socket. `up` creates it, so that it knows port 0, and connections wait while the receiver restarts.

    `timeout`: seconds to retry while the port is in use. Raises ConfigurationError.
    """
    host, _, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    until = time.monotonic() + timeout
    while True:
        try:
            made = socket.create_server(
                (host, int(port)), backlog=BACKLOG, family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as exc:
            if time.monotonic() < until:
                time.sleep(POLL_INTERVAL)
                continue
            # The exception's own text is long. A host name that cannot be resolved has a negative number.
            why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
            option = f"--{field.replace('_', '-')}"
            raise ConfigurationError(
                f"cannot listen at {bind} ({why}): choose another with {option} or {table.variable(field)}"
            ) from exc
        with made:
            yield made
        return


def _run(
    settings: Settings, public: socket.socket, admin: socket.socket, cluster: Cluster | None, orders: StopSignal
) -> None:
    receiver = Child(_part("receiver", ["serve", "--fd", str(public.fileno())], public))
    workers = [Child(_part(f"worker-{number}", ["worker"])) for number in range(1, settings.workers + 1)]
    others = [Child(_part("admin", ["admin", "--fd", str(admin.fileno())], admin)), *workers]
    children = [receiver, *others]
    try:
        with session.database(settings) as engine:
            began = _now(engine)
            for child in children:
                child.start()
            _await_ready(children, settings, public, admin, orders, lambda: _at_work(engine, workers, began))
            _warn_without_destination(engine, settings)
        postgres = _Postgres(cluster)
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


def _part(name: str, command: Sequence[str], listener: socket.socket | None = None) -> Part:
    # -P: Python does not import modules from the current directory.
    return Part(
        name=name,
        command=[sys.executable, "-P", "-m", "receiver", *command],
        timeout=DRAIN,
        descriptors=() if listener is None else (listener.fileno(),),
    )


class _Postgres:
    """Supervisor of the embedded PostgreSQL: restarts it when it does not run."""

    def __init__(self, cluster: Cluster | None) -> None:
        self._cluster = cluster
        self._due = time.monotonic()

    def keep(self) -> None:
        """Restart PostgreSQL if it does not run. Checks once every POSTGRES_POLL_INTERVAL seconds."""
        if self._cluster is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + POSTGRES_POLL_INTERVAL
        try:
            if not self._cluster.running():
                log.error("up.postgres_ended")
                self._cluster.start()
                log.info("up.postgres_started", pid=self._cluster.pid())
        except ReceiverError as exc:
            log.error("up.postgres_not_started", error=str(exc), again_in=POSTGRES_PAUSE)
            self._due = time.monotonic() + POSTGRES_PAUSE


def _await_ready(
    children: Sequence[Child],
    settings: Settings,
    public: socket.socket,
    admin: socket.socket,
    orders: StopSignal,
    at_work: Callable[[], bool],
) -> None:
    """Wait until the listeners answer and `at_work` is true, and print the `ready` line.

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
        if _answers(public, "/livez") and _answers(admin, "/readyz") and (worker_ended or at_work()):
            log.info("up.ready", bind=_address(settings.bind, public), part="receiver")
            log.info("up.ready", bind=_address(settings.admin_bind, admin), part="admin")
            click.echo(f"ready http://{_address(settings.bind, public)}")
            return
        if time.monotonic() > due:
            log.warning("up.not_ready", seconds=_NOT_READY)
            due += _NOT_READY
        time.sleep(POLL_INTERVAL)


def _now(engine: Engine) -> datetime:
    """The time of the database, which the workers use for their heartbeats."""
    with engine.connect() as connection:
        return connection.execute(select(func.now())).scalar_one()


def _at_work(engine: Engine, workers: Sequence[Child], since: datetime) -> bool:
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


def _address(bind: str, listener: socket.socket) -> str:
    """HOST:PORT with the requested host and the actual port."""
    return f"{bind.rpartition(':')[0]}:{listener.getsockname()[1]}"


def _answers(listener: socket.socket, path: str) -> bool:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - connects, does not bind
    connection = HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
