"""A site as a hospital would have it: one PostgreSQL, hosts that reach it over TCP, and the sender's own ledgers.

Every host has its own directory and its own proxy before the database, and shares nothing with the others but a copy of
the keyring. Everything is a real process, listens on loopback, and is ended by its number.
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
from sqlalchemy import Engine, make_url, text

from receiver import keyring as keyrings
from receiver.database.embedded.cluster import DATABASE, ROLE, Cluster
from receiver.database.engine import open_engine
from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.simulator.attacks import AttackTarget
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.feed import FeedSimulator
from tests.cli.machine import SOURCE, Machine
from tests.faults import checker, effects
from tests.faults.proxy import Proxy
from tests.support.postgres import open_directory
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
# As short as it may be: what a killed worker held is another's after so long.
LEASE = "5"


class Host(Machine):
    """A machine of the site. Its commands, its `up` and its workers see the database through its own proxy."""

    def __init__(self, root: Path, proxy: Proxy, environment: dict[str, str]) -> None:
        super().__init__(root, sys.executable)
        self.proxy = proxy
        # What stands before the command of each part: how it gets onto the host, if that has a network of its own.
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
        """Start a worker alone, as on a host for workers; `more` stands in its environment."""
        self.workers.append(self._part("worker", more))
        return self.workers[-1]

    @contextmanager
    def receiving(self, **more: str) -> Iterator[str]:
        """The URL of a receiver alone, as on one of several hosts behind a balancer, while the block runs."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            receiver = self._part(f"serve --receivers 1 --fd {listener.fileno()}", more, listener.fileno())
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                self.end(receiver)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End it in order; what does not end so is ended all the same."""
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

    def told(self, event: str, *, after: int = 0) -> list[dict[str, Any]]:
        """The lines of that event in the log, from the byte `after` on."""
        lines = self.log.read_bytes()[after:].decode(errors="replace").splitlines()
        found = [json.loads(line) for line in lines if f'"{event}"' in line and line[0] + line[-1] == "{}"]
        return [line for line in found if line["event"] == event]

    def revive(self) -> None:
        """Start again each worker that has ended, as a process manager does."""
        for worker in [each for each in self.workers if each.poll() is not None]:
            self.workers.remove(worker)
            self.work()

    def clear(self) -> None:
        """End whatever is left; the directory is the site's."""
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


class Site:
    """The whole. `first` runs `up`; `second`, and whoever else there is, has workers alone."""

    def __init__(self, root: Path, *, handlers: str) -> None:
        self.root = root
        self.cluster = Cluster(root / "postgres", options={"max_connections": "200"})
        self.effects = root / "effects"
        self.effects.mkdir()
        self._handlers = handlers
        self._stack = ExitStack()
        # What was sent to each destination, whoever sent it.
        self.sent: defaultdict[str, AttemptLog] = defaultdict(AttemptLog)
        self.hosts: list[Host] = []
        self.first, self.second = self._host("first"), self._host("second")

    def _host(self, name: str) -> Host:
        """One more host; it is cleared before the database is stopped."""
        directory = self.root / name
        directory.mkdir()
        proxy = Proxy(self._connect)
        self._stack.callback(proxy.close)
        host = Host(directory, proxy, {"RECEIVER_HANDLERS": self._handlers, "EFFECTS": str(self.effects)})
        self._stack.callback(host.clear)
        self.hosts.append(host)
        return host

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        try:
            address = make_url(self.cluster.url)
            made.connect(str(Path(str(address.query["host"])) / f".s.PGSQL.{address.query['port']}"))
        except (OSError, ConfigurationError) as exc:
            made.close()
            raise ConnectionRefusedError from exc
        return made

    def start(self) -> None:
        """Make the database, the tables and the keyring, and give each host a copy of it."""
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
        """Straight to the database, past every proxy."""
        return open_engine(self.cluster.url)

    @cached_property
    def keyring(self) -> Keyring:
        """What opens the payloads."""
        return keyrings.load_keyring(self.first.data_dir / "keyring.json")

    def target(self, destination: str, url: str | None = None) -> AttackTarget:
        """The destination as Redox knows it: at the first host, or at another's `url`."""
        return AttackTarget(
            base_url=url or self.first.url,
            destination=destination,
            source_id=SOURCE,
            token=(self.first.root / f"{destination}.token").read_text().strip(),
        )

    def feed(self, destination: str, name: str) -> FeedSimulator:
        """A feed of that destination, which gives up after two minutes; Redox never does."""
        return FeedSimulator(
            self.target(destination).redox(), name=name, time_scale=0.02, deadline=120, ledger=self.sent[destination]
        )

    def note(self, destination: str, sent: AttemptLog) -> None:
        """Add what somebody else has sent to the destination."""
        for attempt in sent.attempts:
            self.sent[destination].record(attempt)

    def open(self, destination: str) -> None:
        """Register a destination, and wait until what comes in is handed to the handlers."""
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
        """Wait until all that can be done is done, and judge: see tests.faults.checker."""
        with self.engine.connect() as connection:

            def finished() -> bool:
                connection.rollback()
                return not checker.unfinished(connection)

            with suppress(AssertionError):  # what is left is told as what it is
                until(finished, seconds)
        with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            # What waited for a time may run on meanwhile. First the database's moment, then what the other system was
            # told: of what has succeeded by then, it was told before.
            connection.execute(text("SELECT 1"))
            return checker.violations(
                checker.Evidence(connection=connection, keyring=self.keyring, ledgers=self.sent, journal=self.journal())
            )

    def gate(self, handler: str, message: str, *, host: Host | None = None) -> Path:
        """Put a gate before that handler for that message; it stands until it is unlinked.

        `host`: it stands on that host alone, of which the environment says GATES.
        """
        gate = (self.effects if host is None else Path(host.environment["GATES"])) / f"{handler}.{message}"
        gate.touch()
        return gate

    def journal(self) -> list[dict[str, Any]]:
        """What the other system was told, in order."""
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.effects / "journal").read_text().splitlines()]
        return []

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def clear(self) -> None:
        """End everything, and remove it."""
        self._stack.close()
        self.cluster.stop()
        shutil.rmtree(self.root)


@contextmanager
def site(*, handlers: str = effects.__name__) -> Iterator[Site]:
    """A site on which the database runs and nothing else."""
    made = Site(open_directory(), handlers=handlers)
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
    """The process ids of gunicorn's workers on that host."""
    return [
        each.pid for each in psutil.Process(host.part("receiver")).children() if "gunicorn" in " ".join(each.cmdline())
    ]
