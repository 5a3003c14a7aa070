"""Deliveries a second that a worker hands to an idle handler, and their latency, with the order checked.

Run it as `python -m tests.bench.lanes`. The embedded PostgreSQL is durable, the worker is a real process, and each
message has 4 KB. It measures the backlog of a resumed handler, from the first run to the last. The handlers' own notes,
not the database, show whether each ran once and in the order of its lane. It checks no speed, but a run out of order
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, make_url, text

from receiver import keyring as keyrings
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.pipeline import Admitted
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry import loader
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.key_records import record_keys
from receiver.worker import discovery
from receiver.worker.hints import LaneNotifier
from tests.bench import idle
from tests.support.postgres import open_directory
from tests.support.processes import end
from tests.support.waiting import until

PLUGIN = "tests.bench.idle"
ROOT = Path(__file__).parents[2]
SIZE = 4096
STUCK = 100_000
_TIMEOUT = 300.0  # seconds


@dataclass
class Bench:
    """One database with a destination, its workers, and the notes of its handlers."""

    url: str
    directory: Path
    concurrency: int
    postgres: int  # the postmaster's number
    stack: ExitStack
    bodies: dict[int, str] = field(default_factory=dict)  # message number → its lane
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine: Engine = open_engine(self.url)
        self.stack.callback(self.engine.dispose)
        self.keyring = keyrings.create(datetime.now(UTC))
        self.keyring.save(self.directory / "keyring.json")
        with self.engine.begin() as connection:
            record_keys(connection, self.keyring)
        self.registration = RegistryChanges(self.engine, self.keyring, actor="bench@bench")
        self.registration.add_destination(
            "lab",
            datetime.now(UTC),
            environment="staging",
            require=["token"],
            sources_policy="any",
            on_unknown_source="reject",
            test_messages="accept",
            reply_with=None,
            token="a token of twenty-four characters",
        )

    @property
    def notes_path(self) -> Path:
        """Where the handlers note that they ran."""
        return self.directory / "notes"

    def notes(self, since: int = 0) -> list[idle.Note]:
        """Return the notes about messages from number `since` on."""
        return [note for note in idle.notes(self.notes_path) if note.number >= since]

    def noted(self) -> int:
        """Return the number of notes."""
        return self.notes_path.stat().st_size // idle.NOTE.size if self.notes_path.exists() else 0

    def enable(self, handler: str) -> None:
        """Bind one of the handlers."""
        self.registration.enable_handler("lab", discovery.load_handler(handler, [PLUGIN]).spec, datetime.now(UTC))
        self.__dict__.pop("destination", None)

    @cached_property
    def destination(self) -> Destination:
        """The destination, with its bound handlers."""
        with self.engine.connect() as connection:
            return loader.load_registry(connection, self.keyring).destinations["lab"]

    def admitted(self, lane: str) -> Admitted:
        """Return the next message, of the source and the patient `lane`."""
        number = len(self.bodies) + 1
        self.bodies[number] = lane
        made: dict[str, Any] = {
            "Meta": {
                "DataModel": "PatientAdmin",
                "EventType": "Arrival",
                "Source": {"ID": lane},
                "Logs": [{"ID": str(number)}],
            },
            "Patient": {"Identifiers": [{"ID": lane, "IDType": "MR"}], "Notes": []},
        }
        made["Patient"]["Notes"] = ["synthetic " * ((SIZE - len(json.dumps(made))) // 10)]
        body = json.dumps(made).encode()
        head = Head(
            destination="lab",
            method="POST",
            headers={},
            target="/redox/lab",
            query="",
            peer="127.0.0.1",
            received_at=datetime.now(UTC),
        )
        return Admitted(
            inbound=Inbound(head=head, body=body),
            destination=self.destination,
            message=read(body),
            verified=Verified(credentials=(1,), kinds=frozenset({"token"})),
            quarantine=None,
            query=None,
        )

    def fill(self, count: int, among: int, prefix: str = "s") -> int:
        """Record messages with the real ledger, of each lane in turn. Returns the number of the first."""
        first = len(self.bodies) + 1
        ledger = MessageLedger(self.engine, self.keyring, quarantine_quota=1 << 30)
        ledger.start()
        try:
            for start in range(0, count, 500):
                waiting = [
                    ledger.accept(self.admitted(f"{prefix}{number % among}"))
                    for number in range(start, min(count, start + 500))
                ]
                for each in waiting:
                    each.result(60)
        finally:
            ledger.stop()
        return first

    def work(self, count: int = 1) -> None:
        """Start workers, and wait until each is alive."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")} | {
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": self.url,
            "RECEIVER_DATA_DIR": str(self.directory),
            "RECEIVER_HANDLERS": PLUGIN,
            "RECEIVER_CONCURRENCY": str(self.concurrency),
            idle.VARIABLE: str(self.notes_path),
        }
        for _ in range(count):
            with (self.directory / "workers.log").open("ab") as log:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "receiver", "worker"],
                        env=environment,
                        cwd="/",
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
            self.stack.callback(end, self.workers[-1], 40)
        until(
            lambda: self.scalar("SELECT count(*) FROM workers") >= count, "the workers have started", seconds=_TIMEOUT
        )

    def warm(self, handler: str) -> None:
        """Start the handler processes before anything is timed."""
        first = self.fill(8 * self.concurrency * max(1, len(self.workers)), among=8 * self.concurrency, prefix="warm")
        self.until_done(handler)
        assert first

    def cpu(self) -> float:
        """Return the seconds of CPU that the workers, their handler processes and PostgreSQL have used so far."""
        used = 0.0
        for root in [*(worker.pid for worker in self.workers), self.postgres]:
            for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    # This includes children that have ended.
                    used += sum((times.user, times.system, times.children_user, times.children_system))
        return used

    def scalar(self, query: str, **values: Any) -> Any:
        """The one value of a query."""
        with self.engine.connect() as connection:
            return connection.execute(text(query), values).scalar_one()

    def execute(self, statement: str, **values: Any) -> None:
        """Change something."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def pause(self) -> None:
        """Pause the handlers until `resume`."""
        self.execute("UPDATE subscriptions SET paused_at = now()")

    def resume(self) -> None:
        """Resume the handlers."""
        self.execute("UPDATE subscriptions SET paused_at = NULL")

    def until_done(self, handler: str) -> None:
        """Wait until no delivery of the handler can run."""
        until(
            lambda: (
                not self.scalar(
                    "SELECT count(*) FROM deliveries WHERE state = 'pending' AND handler = :handler "
                    "AND lane <> handler || '/lab/source:stuck'",
                    handler=handler,
                )
            ),
            f"{handler} is done",
            seconds=_TIMEOUT,
        )

    def judge(self, first: int, last: int, *, ordered: bool) -> list[str]:
        """Return the errors in the runs of messages `first` to `last`: each must run once, in the order of its lane."""
        ran = [note for note in self.notes() if first <= note.number <= last]
        wrong = []
        if len(ran) != len({note.number for note in ran}):
            wrong.append(f"{len(ran) - len({note.number for note in ran})} ran twice")
        if missing := last - first + 1 - len({note.number for note in ran}):
            wrong.append(f"{missing} never ran")
        by_lane: dict[str, list[int]] = defaultdict(list)
        for note in ran:
            by_lane[self.bodies[note.number]].append(note.number)
        if ordered and (broken := sum(numbers != sorted(numbers) for numbers in by_lane.values())):
            wrong.append(f"{broken} lanes out of order")
        recorded = self.scalar(
            "SELECT count(*) FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id "
            "JOIN messages m ON m.id = d.message_id WHERE a.outcome = 'succeeded' AND a.attempt = 1 AND "
            "m.log_id::bigint BETWEEN :first AND :last AND d.state = 'succeeded' AND d.attempts = 1",
            first=first,
            last=last,
        )
        if recorded != last - first + 1:
            wrong.append(f"{recorded} successes are on record, of {last - first + 1}")
        return wrong


class Server:
    """One durable PostgreSQL, and fresh databases in it."""

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster(directory / "postgres")
        self._directory = directory
        self._count = 0

    def start(self) -> None:
        """Start the server, and migrate the template."""
        self.cluster.start()
        engine = open_engine(self.cluster.url, pooled=False)
        migrations.upgrade(engine)

    @contextmanager
    def bench(self, concurrency: int) -> Iterator[Bench]:
        """Return a fresh database."""
        self._count += 1
        name = f"bench_{self._count}"
        admin = open_engine(make_url(self.cluster.url).set(database="postgres").render_as_string(), pooled=False)
        template = make_url(self.cluster.url).database
        assert template is not None
        with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f'CREATE DATABASE {name} TEMPLATE "{template}"')
        directory = self._directory / name
        directory.mkdir()
        with ExitStack() as stack:
            yield Bench(
                make_url(self.cluster.url).set(database=name).render_as_string(),
                directory,
                concurrency,
                self.cluster.pid() or 0,
                stack,
            )
        with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@dataclass(frozen=True)
class Scene:
    """A number of lanes, and the handler whose ordering creates them."""

    name: str
    handler: str
    lanes: int
    each: int  # deliveries a lane

    @property
    def count(self) -> int:
        """All deliveries."""
        return self.lanes * self.each


SCENES = [
    Scene("1", "by-source", 1, 6_000),
    Scene("8", "by-source", 8, 1_000),
    Scene("10000", "by-patient", 10_000, 1),
    Scene("none", "in-none", 1_000, 8),
]


@dataclass(frozen=True)
class Result:
    """Deliveries a second, milliseconds of CPU (all processes) for each delivery, and the errors."""

    rate: float
    cpu: float
    wrong: list[str]

    def __str__(self) -> str:
        return f"{self.rate:6.0f} deliveries/s, {self.cpu:.2f} ms of CPU each {'; '.join(self.wrong)}"


def backlog(bench: Bench, scene: Scene, scale: float) -> Result:
    """Measure a backlog that has waited for the handler."""
    bench.pause()
    count = max(scene.lanes if scale >= 1 else 1, int(scene.count * scale))
    first = bench.fill(count, among=scene.lanes)
    last = first + count - 1
    before, noted = bench.cpu(), bench.noted()
    bench.resume()
    until(lambda: bench.noted() >= noted + count, "all have run", seconds=_TIMEOUT)  # without a query
    bench.until_done(scene.handler)
    cpu = (bench.cpu() - before) / count * 1000
    ran = [note for note in bench.notes(first) if note.number <= last]
    rate = (len(ran) - 1) / ((ran[-1].at - ran[0].at) / 1e9)
    return Result(rate, cpu, bench.judge(first, last, ordered=scene.handler != "in-none"))


def stick(bench: Bench, handler: str) -> None:
    """Insert 100,000 pending deliveries into a lane that waits for its time."""
    bench.execute(
        """
        INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline, generation)
        SELECT m.id, m.received_at, 1, :handler, :handler || '/lab/source:stuck', false, g
        FROM (SELECT id, received_at FROM messages ORDER BY id DESC LIMIT 1) m, generate_series(2, :count) g""",
        handler=handler,
        count=STUCK + 1,
    )
    bench.execute(
        """
        INSERT INTO lanes (lane, handler, destination_id, state, ready_at)
        SELECT :handler || '/lab/source:stuck', :handler, 1, 'waiting', now() + interval '1 day'""",
        handler=handler,
    )
    bench.execute("ANALYZE deliveries")


def unstick(bench: Bench) -> None:
    """Delete them."""
    bench.execute("DELETE FROM deliveries WHERE lane LIKE '%stuck'")
    bench.execute("DELETE FROM lanes WHERE lane LIKE '%stuck'")


def stuck(bench: Bench, rounds: int, scale: float) -> tuple[Result, Result]:
    """Return the medians without and with a stuck lane, measured in turn."""
    free, with_stuck = [], []
    for _ in range(rounds):
        free.append(backlog(bench, SCENES[1], scale))
        stick(bench, SCENES[1].handler)
        with_stuck.append(backlog(bench, SCENES[1], scale))
        unstick(bench)
    return median(free), median(with_stuck)


def median(results: list[Result]) -> Result:
    """Return the median of each figure, and all errors."""
    return Result(
        statistics.median(each.rate for each in results),
        statistics.median(each.cpu for each in results),
        [wrong for each in results for wrong in each.wrong],
    )


def latency(bench: Bench, count: int) -> list[float]:
    """Return the milliseconds from each COMMIT to the handler's start, for single messages to an idle worker."""
    hints = LaneNotifier(bench.engine)
    hints.start()
    ledger = MessageLedger(bench.engine, bench.keyring, quarantine_quota=1 << 30, on_commit=hints.hint)
    ledger.start()
    took = []
    try:
        for number in range(count):
            before = bench.noted()
            ledger.accept(bench.admitted(f"idle{number % 5}")).result(60)
            committed = time.monotonic_ns()
            until(lambda: bench.noted() > before, "it has run", seconds=_TIMEOUT)  # noqa: B023 - within this turn
            took.append((bench.notes()[-1].at - committed) / 1e6)
            time.sleep(0.05)  # the lane is released, and everything is idle again
    finally:
        ledger.stop()
        hints.stop()
    return took


@contextmanager
def durable() -> Iterator[Server]:
    """Run a server while the block runs, and remove it."""
    directory = open_directory()
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["rm", "-rf", "--", str(directory)], check=True)
        server = Server(directory)
        server.start()
        stack.callback(server.cluster.stop)
        yield server


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each case. Returns 1 if a delivery ran out of order, twice or never."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.lanes", description=__doc__)
    parser.add_argument("--scenes", default="1,8,10000,none,stuck,latency", help="which, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of deliveries")
    parser.add_argument("--concurrency", type=int, default=4, help="handler processes of a worker")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    wanted = options.scenes.split(",")
    wrong: list[str] = []
    with durable() as server:
        for scene in SCENES:
            if scene.name in wanted:
                with server.bench(options.concurrency) as bench:
                    bench.enable(scene.handler)
                    bench.work(options.workers)
                    bench.warm(scene.handler)
                    result = backlog(bench, scene, options.scale)
                    wrong += result.wrong
                    print(f"{scene.name:>6} lanes ({scene.handler}): {result}", flush=True)
        if "stuck" in wanted:
            with server.bench(options.concurrency) as bench:
                bench.enable("by-source")
                bench.work(options.workers)
                bench.warm("by-source")
                free, with_stuck = stuck(bench, 3, options.scale / 2)
                wrong += free.wrong + with_stuck.wrong
                print(
                    f"     8 lanes: {free}\n     with {STUCK:,} pending in a stuck one: {with_stuck}\n"
                    f"     slower by {(1 - with_stuck.rate / free.rate) * 100:.0f} %, by CPU "
                    f"{(with_stuck.cpu / free.cpu - 1) * 100:.0f} %",
                    flush=True,
                )
        if "latency" in wanted:
            with server.bench(options.concurrency) as bench:
                bench.enable("by-source")
                bench.work(options.workers)
                bench.warm("by-source")
                took = sorted(latency(bench, 100))
                print(f"commit to start, idle: p50 {statistics.median(took):.1f} ms, p95 {took[94]:.1f} ms", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
