"""A site with several hosts: one PostgreSQL, hosts that reach it over TCP, and the sender's attempt logs.

Every host has its own directory and its own TCP proxy in front of the database. Hosts share only a copy of the keyring.
All processes are real, listen on loopback, and are ended by process id.
"""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, text

from receiver import keyring as keyrings
from receiver.database.embedded.cluster import Cluster
from receiver.database.embedded.server_settings import DATABASE, ROLE
from receiver.database.engine import open_engine
from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.simulator.attacks import AttackTarget
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.feed import FeedSimulator
from tests.faults import checker, effects
from tests.support.machine import SOURCE, Machine
from tests.support.postgres import open_directory
from tests.support.tcp_proxy import TcpProxy, connect_to
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
# Seconds, the minimum: another worker takes over the lanes of a killed worker after this time.
LEASE = "5"


class Host(Machine):
    """A host of the site. Its commands, its `up` and its workers reach the database through its own proxy."""

    def __init__(self, root: Path, proxy: TcpProxy, environment: dict[str, str]) -> None:
        super().__init__(root, sys.executable)
        self.proxy = proxy
        # Put before each command: `ip netns exec …` if the host has its own network.
        self.prefix: tuple[str, ...] = ()
        self.environment |= environment | {
            "DATABASE_URL": f"postgresql://{ROLE}@127.0.0.1:{proxy.port}/{DATABASE}",
            "PYTHONPATH": str(ROOT),
            "RECEIVER_LEASE": LEASE,
            "TMPDIR": str(root),
            "HOME": str(root),
        }
        self.workers: list[subprocess.Popen[bytes]] = []

    def work(self, **more: str) -> subprocess.Popen[bytes]:
        """Start a worker, as on a host that runs only workers. `more`: added to its environment."""
        self.workers.append(self._part("worker", more))
        return self.workers[-1]

    @contextmanager
    def receiving(self, **more: str) -> Iterator[str]:
        """Run only a receiver during the block, as on a host behind a load balancer. Yields its URL."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            receiver = self._part(f"serve --receivers 1 --fd {listener.fileno()}", more, listener.fileno())
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                self.end(receiver)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop a process with SIGTERM, and with SIGKILL if it still runs after a minute."""
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            _kill(psutil.Process(process.pid).children(recursive=True))
            process.kill()
            process.wait(30)
        if process in self.workers:
            self.workers.remove(process)

    def _part(self, command: str, more: dict[str, str], *descriptors: int) -> subprocess.Popen[bytes]:
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*self.prefix, self.python, "-P", "-m", "receiver", *command.split()],
                cwd=self.root,
                env=self._environment() | more,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )

    def log_lines(self, event: str, *, after: int = 0) -> list[dict[str, Any]]:
        """Return the log lines of that event, from byte `after` on."""
        lines = self.log.read_bytes()[after:].decode(errors="replace").splitlines()
        found = [json.loads(line) for line in lines if f'"{event}"' in line and line[0] + line[-1] == "{}"]
        return [line for line in found if line["event"] == event]

    def revive(self) -> None:
        """Restart each worker that has ended, as a process manager does."""
        for worker in list(self.workers):
            # A killed process is a zombie before its last thread has ended; only then can it be waited for.
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE:
                    worker.wait(30)
            if worker.poll() is not None:
                self.workers.remove(worker)
                self.work()

    def clear(self) -> None:
        """Kill all processes that are left. The site removes the directory."""
        for worker in self.workers:
            if worker.poll() is None:
                _kill(psutil.Process(worker.pid).children(recursive=True))
                worker.kill()
            worker.wait(30)
        if self.process is not None and self.process.poll() is None:
            left = psutil.Process(self.process.pid).children(recursive=True)
            _kill([psutil.Process(self.process.pid), *left])
            self.process.communicate()
            psutil.wait_procs(left, 30)


class Installation:
    """A database and its hosts. `first` runs `up`; `second` and any further host run only workers."""

    def __init__(self, root: Path, *, handlers: str) -> None:
        self.root = root
        self.cluster = Cluster(root / "postgres", options={"max_connections": "200"})
        self.effects = root / "effects"
        self.effects.mkdir()
        self._handlers = handlers
        self._stack = ExitStack()
        # All attempts by destination, from all senders.
        self.sent: defaultdict[str, AttemptLog] = defaultdict(AttemptLog)
        self.hosts: list[Host] = []
        self.first, self.second = self._host("first"), self._host("second")

    def _host(self, name: str) -> Host:
        """Add a host. Its processes are killed before the database is stopped."""
        directory = self.root / name
        directory.mkdir()
        proxy = TcpProxy(self._connect)
        self._stack.callback(proxy.close)
        host = Host(directory, proxy, {"RECEIVER_HANDLERS": self._handlers, "EFFECTS": str(self.effects)})
        self._stack.callback(host.clear)
        self.hosts.append(host)
        return host

    def _connect(self) -> socket.socket:
        try:
            return connect_to(self.cluster.url)
        except ConfigurationError as exc:
            raise ConnectionRefusedError from exc

    def start(self) -> None:
        """Create the database, the tables and the keyring, and copy the keyring to each host."""
        self.cluster.start()
        self._stack.callback(self.engine.dispose)
        self.first.run("db", "upgrade")
        self.first.run("keys", "init")
        for host in self.hosts[1:]:
            host.data_dir.mkdir(mode=0o700)
            shutil.copy(self.first.data_dir / "keyring.json", host.data_dir)
        with self.engine.begin() as connection:
            connection.execute(text(effects.TABLE))

    @cached_property
    def engine(self) -> Engine:
        """An engine that reaches the database directly, without a proxy."""
        return open_engine(self.cluster.url)

    @cached_property
    def keyring(self) -> Keyring:
        """The keyring of the site."""
        return keyrings.load_keyring(self.first.data_dir / "keyring.json")

    def target(self, destination: str, url: str | None = None) -> AttackTarget:
        """Return the destination with its credentials, at the first host or at `url`."""
        return AttackTarget(
            base_url=url or self.first.url,
            destination=destination,
            source_id=SOURCE,
            token=(self.first.root / f"{destination}.token").read_text().strip(),
        )

    def feed(self, destination: str, name: str) -> FeedSimulator:
        """Return a feed to that destination. It gives up a message after two minutes; Redox never does."""
        return FeedSimulator(
            self.target(destination).redox(), name=name, time_scale=0.02, deadline=120, ledger=self.sent[destination]
        )

    def note(self, destination: str, sent: AttemptLog) -> None:
        """Add attempts that another sender made at the destination."""
        for attempt in sent.attempts:
            self.sent[destination].record(attempt)

    def open(self, destination: str) -> None:
        """Register a destination, and wait until its messages are delivered to handlers."""
        self.first.register(destination)
        with self.feed(destination, "opening") as feed:
            seeds = itertools.count(900_000)

            def handed_over() -> bool:
                feed.deliver(self.target(destination).redox().body("Results.New", seed=next(seeds)))
                return bool(
                    self.rows(
                        "SELECT FROM messages m JOIN destinations t ON t.id = m.destination_id WHERE t.name = :name "
                        "AND m.state = 'accepted'",
                        name=destination,
                    )
                )

            until(handed_over)

    def violations(self, seconds: float = 90.0) -> list[str]:
        """Wait until every delivery that can run has ended, then check: see tests.faults.checker."""
        with self.engine.connect() as connection:

            def finished() -> bool:
                connection.rollback()
                return not checker.unfinished(connection)

            with suppress(AssertionError):  # the checker reports the rest
                until(finished, seconds=seconds)
        with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            # Deliveries with a retry time may still run. Take the snapshot first, then read the journal: it then has a
            # line for each delivery that succeeded before the snapshot.
            connection.execute(text("SELECT 1"))
            return checker.violations(
                checker.Evidence(connection=connection, keyring=self.keyring, ledgers=self.sent, journal=self.journal())
            )

    def gate(self, handler: str, message: str, *, host: Host | None = None) -> Path:
        """Block that handler for that message until the returned file is removed.

        `host`: block it on that host only, in the directory that its environment names as GATES.
        """
        gate = (self.effects if host is None else Path(host.environment["GATES"])) / f"{handler}.{message}"
        gate.touch()
        return gate

    def journal(self) -> list[dict[str, Any]]:
        """Return the calls that handlers made to the external system, in order."""
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.effects / "journal").read_text().splitlines()]
        return []

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def clear(self) -> None:
        """Stop everything, and remove the directory."""
        self._stack.close()
        self.cluster.stop()
        shutil.rmtree(self.root)


@contextmanager
def site(*, handlers: str = effects.__name__) -> Iterator[Installation]:
    """Run a site during the block, with only the database started."""
    made = Installation(open_directory(), handlers=handlers)
    try:
        made.start()
        yield made
    finally:
        made.clear()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def receiver_workers(host: Host) -> list[int]:
    """Return the process ids of gunicorn's workers on that host."""
    return [
        each.pid for each in psutil.Process(host.part("receiver")).children() if "gunicorn" in " ".join(each.cmdline())
    ]
