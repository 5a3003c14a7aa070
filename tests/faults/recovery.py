"""How soon all is well again: each fault once, under load, with a figure and, where one is promised, a bound.

`python -m tests.faults.recovery` runs it alone. Afterwards everything is judged as after the rounds. The leases are as
long as they are by default.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
from sqlalchemy.exc import OperationalError

from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError
from receiver.simulator.feed import FeedSimulator
from tests.cli.machine import gone
from tests.faults import effects, outages
from tests.faults.load import Load, name_of
from tests.faults.report import Section, Tell
from tests.faults.rounds import DESTINATIONS, FEEDS, accepting_again, judge
from tests.faults.site import Site, receiver_workers, site
from tests.support.postgres import open_directory
from tests.support.waiting import until

# Seconds that PostgreSQL is away when it is away for long: the workers' engines have given up several times by then.
AWAY: Final = 300.0
# Promised, in seconds.
ACCEPTING: Final = 5.0  # after PostgreSQL is up
DELIVERING: Final = 30.0  # after PostgreSQL is back
TAKEN_OVER: Final = 60.0  # after a worker was killed
ANSWERED: Final = 5.0  # a message, whatever the database does; not what waits for its handler by design
# How long what is not promised may take before it is called lost.
LONGEST: Final = 180.0
# How long an outage lasts that is not to be long: twice what a request may take.
_WHILE: Final = 2 * ANSWERED
# Whose work workers do.
_HANDLERS: Final = ("book", "outside", "anyhow")
# What a handler or a responder has to be done with before it is answered.
_WITHIN: Final = ("Inventory.", "PatientSearch.")
_DISK: Final = "400m"

_DELIVERED: Final = """
WITH done AS (
    SELECT a.worker, d.handler, d.destination_id, a.ended_at
    FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
    WHERE a.outcome = 'succeeded' AND a.ended_at > :since AND d.handler = ANY(:handlers)),
firsts AS (
    SELECT min(ended_at) AS at, true AS by_worker FROM done GROUP BY worker
    UNION ALL SELECT min(ended_at), false FROM done GROUP BY handler, destination_id)
SELECT extract(epoch FROM max(at) - :since) AS seconds, count(*) FILTER (WHERE by_worker) AS workers,
       count(*) FILTER (WHERE NOT by_worker) AS served FROM firsts"""
_OWNER: Final = "SELECT name FROM workers WHERE pid = :pid ORDER BY seen_at DESC LIMIT 1"
# What it had come to the end of is nobody's any more, and needs nobody.
_HELD: Final = """
SELECT lane FROM lanes l WHERE owner = :owner
AND EXISTS (SELECT FROM deliveries d WHERE d.lane = l.lane AND d.state = 'pending')"""
_RECORDED: Final = """
SELECT m.id, m.kind, m.attempt_id FROM messages m JOIN destinations t ON t.id = m.destination_id
WHERE t.name = :destination AND m.attempt_id = ANY(:attempts) ORDER BY m.id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What was measured after what; `seconds` is None when it never came about."""

    fault: str
    what: str
    seconds: float | None
    bound: float | None = None

    @property
    def kept(self) -> bool:
        """Whether it came about, and within its bound."""
        return self.seconds is not None and (self.bound is None or self.seconds <= self.bound)

    def __str__(self) -> str:
        told = "never" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"{self.fault}: {self.what} {told}" + ("" if self.bound is None else f" (promised: {self.bound:g} s)")


@dataclass(kw_only=True)
class Found:
    """What came of it. `skipped`: what could not be done here, and why."""

    tell: Tell
    figures: list[Figure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def note(self, fault: str, what: str, seconds: float | None, bound: float | None = None) -> None:
        """Keep a figure; beyond its bound it is a violation."""
        figure = Figure(fault=fault, what=what, seconds=seconds, bound=bound)
        self.figures.append(figure)
        self.tell(str(figure))
        if not figure.kept:
            self.wrong.append(str(figure))

    def skip(self, what: str) -> None:
        """Say loudly what is not done."""
        self.skipped.append(what)
        self.tell(f"!! SKIPPED: {what}")


class Bench:
    """A site with two workers, under load, and what is found out on it."""

    def __init__(self, here: Site, found: Found) -> None:
        self.site = here
        self.found = found

    @contextmanager
    def load(self, seed: int, *, patience: float = 200.0) -> Iterator[None]:
        """Under load while the block runs; then everything is judged."""
        load = Load(self.site, DESTINATIONS, feeds=FEEDS, seed=seed, patience=patience)
        load.start()
        try:
            yield
        finally:
            load.stop()
        wrong = [*load.given_up, *judge(self.site, load)]
        self.found.tell(f"judged: {len(wrong)} violations")
        self.found.wrong += wrong

    def now(self) -> datetime:
        """By the database's clock."""
        now: datetime = self.site.rows("SELECT clock_timestamp() AS now")[0]["now"]
        return now

    def well_again(self, fault: str, *, accepting: float | None = None, delivering: float | None = None) -> None:
        """From now on: until every feed gets through, and until both workers deliver, each handler's work.

        What is handled within its request stands still longer when its lane's holder was killed: until the lease ends.
        """
        over, since = time.monotonic(), self.now()
        again = accepting_again(self.site, over)
        self.found.note(
            fault, "accepting again", None if again is None else self._refused_until(over, within=False), accepting
        )
        if again is not None and (within := self._refused_until(over, within=True)):
            self.found.note(fault, "accepting again what is handled within the request", within, accepting)
        self.found.note(fault, "delivering again", self._delivering(since), delivering)

    def _refused_until(self, over: float, *, within: bool) -> float:
        """Seconds from `over` until the last message that was refused since then was accepted; 0 when none was."""
        last = 0.0
        for ledger in list(self.site.sent.values()):
            refused = {
                each.message
                for each in ledger.attempts
                if each.sent_at > over
                and each.status != 401
                and not each.accepted
                and each.error != "AnswerLost"
                and each.feed.startswith(DESTINATIONS)
                and str(each.kind).startswith("Inventory.") == within
            }
            for name, accepted in ledger.accepted().items():
                if name in refused and accepted.answered_at is not None:
                    last = max(last, accepted.answered_at - over)
        return last

    def _delivering(self, since: datetime) -> float | None:
        rows: list[dict[str, Any]] = []

        def everybody() -> bool:
            rows[:] = self.site.rows(_DELIVERED, since=since, handlers=list(_HANDLERS))
            return bool(rows[0]["workers"] >= 2 and rows[0]["served"] == len(_HANDLERS) * len(DESTINATIONS))

        return float(rows[0]["seconds"]) if came_about(everybody) else None

    def answers(self, fault: str, began: float, over: float) -> None:
        """What was answered to what was sent meanwhile, and how late."""
        meanwhile = [
            each
            for ledger in list(self.site.sent.values())
            for each in ledger.attempts
            if began <= each.sent_at < over and each.error != "AnswerLost"
        ]
        statuses = Counter(each.status or each.error for each in meanwhile)
        self.found.tell(f"{fault}: " + ", ".join(f"{count} × {status}" for status, count in statuses.most_common()))
        if not statuses[503]:
            self.found.wrong.append(f"{fault}: nobody was answered 503, so it was none")
        self.found.wrong += [
            f"{fault}: {each.message} was not answered ({each.error})" for each in meanwhile if each.answered_at is None
        ]
        took = {
            within: [
                each.answered_at - each.sent_at
                for each in meanwhile
                if each.answered_at is not None and str(each.kind).startswith(_WITHIN) == within
            ]
            for within in (False, True)
        }
        self.found.note(fault, "slowest answer", max(took[False]), ANSWERED)
        if took[True]:
            self.found.note(fault, "slowest answer of what is handled within the request", max(took[True]))

    def in_flight(self, fault: str, began: float, over: float) -> None:
        """Whoever was not answered then was never let in: of his attempt nothing is recorded."""
        # The feeds of two destinations send the same, to each its own.
        left = {
            destination: {
                each.attempt_id: each
                for each in ledger.attempts
                if began <= each.sent_at < over and each.answered_at is None and each.error != "AnswerLost"
            }
            for destination, ledger in list(self.site.sent.items())
        }
        errors = Counter(each.error for these in left.values() for each in these.values())
        self.found.tell(f"{fault}: {errors.total()} were not answered: {dict(errors)}")
        for destination, these in left.items():
            for row in self.site.rows(_RECORDED, destination=destination, attempts=list(these)):
                sent = these[row["attempt_id"]]
                self.found.wrong.append(
                    f"{fault}: messages {row['id']} ({row['kind']}) was recorded and not answered: "
                    f"sent {sent.sent_at - began:.2f} s after it, {sent.error}"
                )


def came_about(holds: Callable[[], object]) -> bool:
    """Whether it did, within what is not called lost."""
    try:
        until(holds, LONGEST)
    except AssertionError:
        return False
    return True


def _answers(here: Site) -> bool:
    """Whether the database does."""
    try:
        return bool(here.rows("SELECT 1 AS one"))
    except (OperationalError, ConfigurationError):
        return False


# --- the database


def database_comes_back(bench: Bench) -> None:
    """Killed, and stopped in order; each time started again at once."""
    cluster = bench.site.cluster
    for fault, stop in (("PostgreSQL killed", partial(outages.kill, cluster)), ("PostgreSQL restarted", cluster.stop)):
        stop()
        cluster.start()
        bench.well_again(fault, accepting=ACCEPTING, delivering=DELIVERING)


def database_unwell(bench: Bench) -> None:
    """It answers nobody, or refuses: 503 in time, and then all is well by itself."""
    here = bench.site
    faults: tuple[tuple[str, AbstractContextManager[None]], ...] = (
        ("PostgreSQL read-only", outages.read_only(here.cluster)),
        (
            "PostgreSQL out of connections",
            outages.connections_taken(here.cluster, lambda: [host.proxy.cut() for host in (here.first, here.second)]),
        ),
        ("PostgreSQL frozen", outages.frozen(here.cluster)),
    )
    for fault, outage in faults:
        began = time.monotonic()
        with outage:
            time.sleep(_WHILE)
        over = time.monotonic()
        bench.well_again(fault, accepting=LONGEST, delivering=LONGEST)
        bench.answers(fault, began, over)


def database_away(bench: Bench, seconds: float) -> None:
    """Away for so long that the workers' engines have ended."""
    fault = f"PostgreSQL away for {seconds:g} s"
    began = time.monotonic()
    bench.site.cluster.stop()
    time.sleep(seconds)
    over = time.monotonic()
    bench.site.cluster.start()
    bench.well_again(fault, accepting=ACCEPTING, delivering=DELIVERING)
    bench.answers(fault, began, over)


def disk_full(bench: Bench) -> None:
    """Neither a row nor the log that tells of it can be written: PostgreSQL panics, and ends. `up` brings it back."""
    fault, cluster = "PostgreSQL out of disk", bench.site.cluster
    pid = cluster.pid()
    with outages.disk_full(cluster.directory.parent.parent):
        began = time.monotonic()
        # What is left of the segment that is being written would do for a while.
        with suppress(OperationalError):
            bench.site.rows("SELECT pg_switch_wal()")
        until(lambda: cluster.pid() != pid)
        bench.found.note(fault, "until it had ended", time.monotonic() - began)
        time.sleep(_WHILE)
        over = time.monotonic()
    answers = came_about(partial(_answers, bench.site))
    bench.found.note(fault, "answering again once there was space", time.monotonic() - over if answers else None)
    bench.well_again(fault, accepting=LONGEST, delivering=LONGEST)
    bench.answers(fault, began, over)


def everything_killed(bench: Bench) -> None:
    """SIGKILL of whatever runs, at once: `up`, gunicorn, workers, handlers, PostgreSQL. Then `up` is started again."""
    here, fault = bench.site, "everything killed at once"
    assert here.first.process is not None
    parents = [here.first.process.pid, here.cluster.pid(), *(each.pid for each in here.second.workers)]
    killed = [
        process
        for pid in parents
        if pid is not None
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    for each in killed:
        with suppress(psutil.NoSuchProcess):  # who has lost its parent ends by itself
            each.kill()
    until(lambda: all(map(gone, killed)))
    here.first.ended()
    began = time.monotonic()
    here.first.up("--workers", "1", bind=here.first.url.removeprefix("http://"))
    bench.found.note(fault, "until `up` said that it was ready", time.monotonic() - began)
    here.second.revive()
    bench.well_again(fault, accepting=LONGEST, delivering=LONGEST)


# --- the receiver


def receiver_killed(bench: Bench) -> None:
    """A gunicorn worker, then the master with all of its own."""
    here = bench.site
    os.kill(receiver_workers(here.first)[0], signal.SIGKILL)
    bench.well_again("a receiver process killed")
    os.kill(here.first.part("receiver"), signal.SIGKILL)
    bench.well_again("gunicorn's master killed")


def receiver_told_to_stop(bench: Bench) -> None:
    """SIGTERM of the receiver, which `up` starts again; then of `up` itself, which is started again here."""
    here = bench.site
    began = time.monotonic()
    master = psutil.Process(here.first.part("receiver"))
    family = [master, *master.children(recursive=True)]
    master.terminate()
    until(lambda: all(map(gone, family)))
    bench.found.note("SIGTERM of the receiver", "until it had ended", time.monotonic() - began)
    bench.well_again("SIGTERM of the receiver")
    bench.in_flight("SIGTERM of the receiver", began, time.monotonic())

    began = time.monotonic()
    assert here.first.process is not None
    here.first.process.terminate()
    status, _ = here.first.ended()
    ended = time.monotonic()
    bench.found.note("SIGTERM of `up`", "until all had ended", ended - began)
    if status != 0:
        bench.found.wrong.append(f"SIGTERM of `up`: exit status {status}")
    here.first.up("--workers", "1", bind=here.first.url.removeprefix("http://"))
    bench.well_again("SIGTERM of `up`")
    bench.in_flight("SIGTERM of `up`", began, ended)


# --- the workers


def worker_killed(bench: Bench, fault: str = "a worker killed") -> None:
    """With all of its handler processes, while one of them is in the midst of a message."""
    here = bench.site
    redox = here.target("lab").redox()
    body = redox.body("Results.New", seed=time.time_ns())
    message = name_of(body)
    gate = here.gate("outside", message)
    with FeedSimulator(redox, name="held", time_scale=0.02, ledger=here.sent["lab"]) as feed:
        feed.deliver(body)
    until(lambda: _lines(here, message, "inside"))
    worker = psutil.Process(_lines(here, message, "inside")[0]["worker"])
    owner = here.rows(_OWNER, pid=worker.pid)[0]["name"]
    began = time.monotonic()
    for each in (worker, *worker.children(recursive=True)):
        each.kill()
    gate.unlink()
    held = len(here.rows(_HELD, owner=owner))
    until(lambda: gone(worker))
    here.second.revive()
    taken = came_about(lambda: not here.rows(_HELD, owner=owner))
    bench.found.note(
        fault, f"its {held} lanes running on others", time.monotonic() - began if taken else None, TAKEN_OVER
    )
    done = came_about(lambda: _lines(here, message, "done"))
    bench.found.note(fault, "its message done", time.monotonic() - began if done else None, TAKEN_OVER)


def _lines(here: Site, message: str, phase: str) -> list[dict[str, Any]]:
    """What the other system was told of that message by the handler `outside`."""
    return [
        line
        for line in here.journal()
        if (line["message"], line["handler"], line["phase"]) == (message, "outside", phase)
    ]


# --- all of it


class OwnDatabase(Site):
    """A site of which the first host's `up` owns the database, in a data directory on that disk."""

    def __init__(self, root: Path, *, handlers: str, disk: Path) -> None:
        super().__init__(root, handlers=handlers)
        del self.first.environment["DATABASE_URL"]
        self.first.data_dir = disk / "data"
        self.first.environment["RECEIVER_DATA_DIR"] = str(self.first.data_dir)
        self.cluster = Cluster(self.first.data_dir)

    def start(self) -> None:
        """As any site; a command that comes before `up` leaves the database running."""
        self._stack.enter_context(self.cluster.joined())
        super().start()


@contextmanager
def _own_database(disk: Path) -> Iterator[Site]:
    made = OwnDatabase(open_directory(), handlers=effects.__name__, disk=disk)
    try:
        made.start()
        yield made
    finally:
        made.clear()


@contextmanager
def _bench(made: AbstractContextManager[Site], found: Found) -> Iterator[Bench]:
    """A worker under the first host's `up`, another on the second, with leases as they are by default."""
    with made as here:
        working(here, "--workers", "1")
        yield Bench(here, found)


def working(here: Site, *options: str) -> None:
    """Start `up` on the first host, a worker on each of the others, and open every destination."""
    for host in here.hosts:
        host.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        del host.environment["RECEIVER_LEASE"]
    here.first.up(*options)
    for host in here.hosts[1:]:
        host.work()
    for destination in DESTINATIONS:
        here.open(destination)


def _at_once(found: Found) -> None:
    disk = open_directory()
    try:
        with _bench(_own_database(disk), found) as bench, bench.load(6):
            everything_killed(bench)
    finally:
        shutil.rmtree(disk)


def _on_a_small_disk(found: Found) -> None:
    if os.geteuid() != 0:
        found.skip("PostgreSQL out of disk: root alone can mount a small one")
        return
    disk = open_directory()
    try:
        with outages.small_disk(disk, _DISK), _bench(_own_database(disk), found) as bench, bench.load(5):
            disk_full(bench)
    finally:
        disk.rmdir()


def measure(tell: Tell, *, away: float = AWAY, only: Sequence[str] = ()) -> Section:
    """Let each fault happen once; `away`: seconds that PostgreSQL is away. `only` these, by the names of PARTS."""
    found = Found(tell=tell)
    wanted = [name for name in PARTS if not only or name in only]
    if any(name not in _OWN for name in wanted):
        with _bench(site(), found) as bench:
            for seed, name in enumerate(wanted, 1):
                if name not in _OWN:
                    with bench.load(seed, patience=200 + away):
                        PARTS[name](bench, away)
    for name, run in _OWN.items():
        if name in wanted:
            run(found)
    return section(
        found,
        "python -m tests.faults.recovery"
        + "".join(f" --only {each}" for each in only)
        + ("" if away == AWAY else f" --away {away:g}"),
    )


PARTS: Final[dict[str, Callable[[Bench, float], None]]] = {
    "database": lambda bench, _: database_comes_back(bench),
    "unwell": lambda bench, _: database_unwell(bench),
    "receiver": lambda bench, _: receiver_killed(bench),
    "stop": lambda bench, _: receiver_told_to_stop(bench),
    "worker": lambda bench, _: worker_killed(bench),
    "away": database_away,
    "everything": lambda bench, _: everything_killed(bench),
    "disk": lambda bench, _: disk_full(bench),
}
# Those that want a site of their own, of which `up` has the database.
_OWN: Final[dict[str, Callable[[Found], None]]] = {"everything": _at_once, "disk": _on_a_small_disk}

_TEXT: Final = """\
Two workers on two hosts, leases of 30 s as by default, load from four feeds, a stranger and an asker of queries. A feed
waits up to 1.2 s before it tries again; that is in the figures. Delivering is what both workers do again, for each
handler and destination. What is promised has a bound.

| what happened | measured | s | at most, s |
|---|---|--:|--:|
{figures}
{skipped}"""


def section(found: Found, command: str) -> Section:
    """The chapter of the report."""
    return Section(
        title="How soon all is well again",
        command=command,
        violations=tuple(found.wrong),
        text=_TEXT.format(
            figures=figures(found), skipped="".join(f"\n**Skipped**: {each}.\n" for each in found.skipped)
        ),
    )


def figures(found: Found) -> str:
    """The lines of the table."""
    return "\n".join(
        f"| {each.fault} | {each.what} | {'never' if each.seconds is None else f'{each.seconds:.2f}'} | "
        f"{'' if each.bound is None else f'{each.bound:g}'} |"
        for each in found.figures
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when all bounds held and nothing was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.recovery", description="Measure how soon all is well again."
    )
    parser.add_argument(
        "--away",
        type=float,
        default=AWAY,
        metavar="SECONDS",
        help="how long PostgreSQL is away when it is away for long  [default: %(default)g]",
    )
    parser.add_argument("--only", action="append", choices=list(PARTS), default=[], help="may be repeated")
    options = parser.parse_args(arguments)
    made = measure(lambda line: print(line, flush=True), away=options.away, only=options.only)
    print(f"\n{made.text}\n" + "".join(f"VIOLATED {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
