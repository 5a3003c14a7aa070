"""`up`: the database, the receiver, the admin process and the delivery workers, all on one machine, until told to stop.

May not receive or deliver anything itself: it starts the processes that do, and keeps them running.
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
from receiver import logs
from receiver import settings as table
from receiver.cli import session
from receiver.cli.commands.serve import database_url, settle_paths
from receiver.cli.options import example
from receiver.cli.up.child_processes import POLL_INTERVAL, Child, Part, stop
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError, ReceiverError
from receiver.fault_injection import enable
from receiver.settings import Settings
from receiver.storage import schema
from receiver.storage.registry.changes import check_keys, record_keys

log: Final = structlog.get_logger(__name__)

# How long a part may take to end in order: gunicorn gives its own processes half a minute.
DRAIN: Final = 40.0

# How often the postmaster is looked at, and how long a start that failed is not tried again.
POSTGRES_POLL_INTERVAL: Final = 1.0
POSTGRES_PAUSE: Final = 10.0

# How long a port may still be held by the processes of an `up` that was killed.
PORT_TIMEOUT: Final = 45.0

# As gunicorn's own: connections that wait while the receiver is started again.
BACKLOG: Final = 2048

_NOT_READY: Final = 60.0


@click.command(epilog=example("up", "up --data-dir /srv/redox --bind 0.0.0.0:8080 --receivers 4 --workers 2"))
@click.option("--bind", metavar="HOST:PORT", help="Public listener; port 0 takes a free one.  [env: RECEIVER_BIND]")
@click.option(
    "--admin-bind", metavar="HOST:PORT", help="Admin listener: keep it on loopback.  [env: RECEIVER_ADMIN_BIND]"
)
@click.option("--receivers", type=int, metavar="N", help="Receiver processes.  [env: RECEIVER_RECEIVERS]")
@click.option("--workers", type=int, metavar="N", help="Delivery workers.  [env: RECEIVER_WORKERS]")
def up(bind: str | None, admin_bind: str | None, receivers: int | None, workers: int | None) -> None:
    """Run everything on one machine, until Ctrl-C or SIGTERM.

    Without DATABASE_URL that is PostgreSQL too, in the data directory: it is made, migrated and given a keyring on
    first use. Prints `ready http://HOST:PORT` on stdout when it serves; the log is on stderr.
    """
    for field, value in (("bind", bind), ("admin_bind", admin_bind), ("receivers", receivers), ("workers", workers)):
        if value is not None:
            os.environ[table.variable(field)] = str(value)
    settings = table.load_settings()
    settle_paths(settings)
    logs.configure(settings.log_level)
    with _stop_signal() as orders, ExitStack() as stack:
        cluster = None
        patience = 0.0
        if settings.database_url is None:
            cluster = Cluster(settings.data_dir, account=settings.postgres_account)
            cluster.check_unowned()
            patience = PORT_TIMEOUT if cluster.running() else 0.0  # left by an `up` that was killed
        # Before anything is made or started: a port in use is the commonest mistake.
        public = stack.enter_context(_listen(settings.bind, "bind", patience))
        admin = stack.enter_context(_listen(settings.admin_bind, "admin_bind", patience))
        if cluster is not None:
            stack.enter_context(cluster.own())
            prepare_own_database(settings)
        else:
            with session.opened():
                pass  # all that is to be said is an error
        enable.enable_faults(database_url(settings))
        _run(settings, public, admin, cluster, orders)
    log.info("up.stopped")


def prepare_own_database(settings: Settings) -> None:
    """Bring the embedded database to this code's revision, with a keyring beside it.

    Raises ConfigurationError when the database was written with a keyring that is not there, or with another.
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
    """What the signals that `up` was sent ask for."""

    def __init__(self) -> None:
        self.count = 0
        self.renew = False  # read the settings anew; whoever has done so takes it back

    @property
    def stop(self) -> bool:
        """To end in order."""
        return self.count > 0

    @property
    def hurry(self) -> bool:
        """To end at once: it was said twice."""
        return self.count > 1


@contextmanager
def _stop_signal() -> Iterator[StopSignal]:
    """Count SIGTERM, SIGINT and SIGHUP while the block runs; none interrupts it.

    SIGHUP says that the terminal was closed; without a terminal, that the settings are to be read anew. One that the
    starter has set to be ignored (nohup) stays ignored.
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
def _listen(bind: str, field: str, patience: float) -> Iterator[socket.socket]:
    """A listening socket, made here so that port 0 is known, and that connections wait while a receiver restarts.

    Raises ConfigurationError. `patience`: seconds that a port in use is tried again.
    """
    host, _, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    until = time.monotonic() + patience
    while True:
        try:
            made = socket.create_server(
                (host, int(port)), backlog=BACKLOG, family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as exc:
            if time.monotonic() < until:
                time.sleep(POLL_INTERVAL)
                continue
            # Its own text is long-winded; a name that cannot be looked up has a negative number.
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
    everybody = [receiver, *others]
    try:
        with session.database(settings) as engine:
            began = _now(engine)
            for child in everybody:
                child.start()
            _await_ready(everybody, settings, public, admin, orders, lambda: _at_work(engine, workers, began))
            _say_what_next(engine, settings)
        postgres = _Postgres(cluster)
        while not orders.stop:
            postgres.keep()
            if orders.renew:
                orders.renew = False
                _renew(everybody, settings)
            for child in everybody:
                child.keep()
            time.sleep(POLL_INTERVAL)
    finally:
        # The receiver first: what comes in while the others end would only wait. Our own ends of the listeners too, or
        # connections would go on being taken for somebody who has gone.
        log.info("up.stopping")
        public.close()
        admin.close()
        for group in ([receiver], others):
            stop(group, hurried=lambda: orders.hurry)


def _say_what_next(engine: Engine, settings: Settings) -> None:
    """After the first start there is no destination, and everything is refused: log the command that adds one."""
    with suppress(SQLAlchemyError), engine.connect() as connection:
        if connection.scalar(select(func.count()).select_from(schema.destinations)) == 0:
            where = "" if settings.database_url else f" --data-dir {shlex.quote(str(settings.data_dir))}"
            log.warning(
                "up.no_destination",
                error="there is no destination yet, so every request is refused: run "
                f"`redox-receiver destination add NAME{where}` in another terminal",
            )


# What is read once, by `up` itself: how many workers there are, and what was opened at its start.
_AT_START: Final = ("database_url", "data_dir", "postgres_account", "bind", "admin_bind", "workers")


def _renew(everybody: Sequence[Child], began: Settings) -> None:
    """Have everybody take the settings as they are now, if they hold. How many of each part there are stays."""
    try:
        settings = table.load_settings()
        keyrings.load_keyring(settings.keyring_path)
    except ConfigurationError as exc:
        log.error("up.settings_refused", error="; ".join(str(exc).splitlines()))
        return
    log.info("up.settings_read")
    table.warn_of_unread()
    kept = [table.variable(name) for name in _AT_START if getattr(settings, name) != getattr(began, name)]
    if kept:
        log.warning(
            "up.restart_needed",
            error=f"{', '.join(kept)} changed: restart `up`, until then it goes on with what it was started with",
        )
    for child in everybody:
        if child.part.name in ("receiver", "admin"):
            child.signal(signal.SIGHUP)  # its own workers are replaced one generation by the next
        else:
            child.renew()


def _part(name: str, command: Sequence[str], listener: socket.socket | None = None) -> Part:
    # -P: no module is taken from the directory that one happens to stand in.
    return Part(
        name=name,
        command=[sys.executable, "-P", "-m", "receiver", *command],
        patience=DRAIN,
        descriptors=() if listener is None else (listener.fileno(),),
    )


class _Postgres:
    """The embedded PostgreSQL, started again when it is gone."""

    def __init__(self, cluster: Cluster | None) -> None:
        self._cluster = cluster
        self._due = time.monotonic()

    def keep(self) -> None:
        """Look after it, once in a while."""
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
    everybody: Sequence[Child],
    settings: Settings,
    public: socket.socket,
    admin: socket.socket,
    orders: StopSignal,
    at_work: Callable[[], bool],
) -> None:
    """Wait until it serves and its workers are `at_work`, and say so.

    The receiver does not depend on a worker: one that ends is started again, and no longer waited for. Raises
    ConfigurationError when another part ends.
    """
    worker_ended = False
    due = time.monotonic() + _NOT_READY
    while not orders.stop:
        for child in everybody:
            if child.part.name.startswith("worker-"):
                before = child.pid
                child.keep()
                worker_ended |= child.pid != before
            elif (status := child.ended()) is not None:
                raise ConfigurationError(
                    f"{child.part.name} did not start (exit status {status}): the log above says "
                    "why, and `redox-receiver check` what mends it"
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
    """The database's time, by which workers say that they live."""
    with engine.connect() as connection:
        return connection.execute(select(func.now())).scalar_one()


def _at_work(engine: Engine, workers: Sequence[Child], since: datetime) -> bool:
    """Whether each has loaded its handlers and said so."""
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
    """HOST:PORT as it was asked for, with the port that it has become."""
    return f"{bind.rpartition(':')[0]}:{listener.getsockname()[1]}"


def _answers(listener: socket.socket, path: str) -> bool:
    host, port = listener.getsockname()[:2]
    connection = HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, timeout=2)  # noqa: S104  read, not bound
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
