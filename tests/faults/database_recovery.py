"""Recovery from faults of PostgreSQL, and from the death of all processes at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import psutil
from sqlalchemy.exc import OperationalError

from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError
from tests.faults import effects, outages
from tests.faults.recovery_times import ACCEPTING, ANSWERED, DELIVERING, LONGEST, RecoveryBench, occurs
from tests.faults.site import Installation
from tests.support.postgres import open_directory
from tests.support.processes import gone
from tests.support.waiting import until

# Seconds of a short outage: twice as long as a request may take.
_SHORT_OUTAGE: Final = 2 * ANSWERED


def database_comes_back(bench: RecoveryBench) -> None:
    """Kill PostgreSQL, then shut it down. Start it again at once each time."""
    cluster = bench.site.cluster
    for fault, stop in (("PostgreSQL killed", partial(outages.kill, cluster)), ("PostgreSQL restarted", cluster.stop)):
        stop()
        cluster.start()
        bench.recovered(fault, accepting=ACCEPTING, delivering=DELIVERING)


def database_unusable(bench: RecoveryBench) -> None:
    """PostgreSQL does not answer, or refuses: the receiver answers 503 in time, and recovers by itself."""
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
            time.sleep(_SHORT_OUTAGE)
        over = time.monotonic()
        bench.recovered(fault, accepting=LONGEST, delivering=LONGEST)
        bench.responses(fault, began, over)


def database_away(bench: RecoveryBench, seconds: float) -> None:
    """Stop PostgreSQL for so long that the workers' engines give up."""
    fault = f"PostgreSQL away for {seconds:g} s"
    began = time.monotonic()
    bench.site.cluster.stop()
    time.sleep(seconds)
    over = time.monotonic()
    bench.site.cluster.start()
    bench.recovered(fault, accepting=ACCEPTING, delivering=DELIVERING)
    bench.responses(fault, began, over)


def disk_full(bench: RecoveryBench) -> None:
    """Fill the disk: PostgreSQL panics and ends. `up` starts it again once there is space."""
    fault, cluster = "PostgreSQL out of disk", bench.site.cluster
    pid = cluster.pid()
    with outages.disk_full(cluster.directory.parent.parent):
        began = time.monotonic()
        # Otherwise the rest of the current WAL segment would last for a while.
        with suppress(OperationalError):
            bench.site.rows("SELECT pg_switch_wal()")
        until(lambda: cluster.pid() != pid)
        bench.results.add(fault, "until PostgreSQL ended", time.monotonic() - began)
        time.sleep(_SHORT_OUTAGE)
        over = time.monotonic()
    answers = occurs(partial(_answers, bench.site))
    bench.results.add(fault, "answering again once there was space", time.monotonic() - over if answers else None)
    bench.recovered(fault, accepting=LONGEST, delivering=LONGEST)
    bench.responses(fault, began, over)


def _answers(here: Installation) -> bool:
    """Return whether the database answers."""
    try:
        return bool(here.rows("SELECT 1 AS one"))
    except (OperationalError, ConfigurationError):
        return False


def all_killed(bench: RecoveryBench) -> None:
    """Kill all processes at once: `up`, gunicorn, workers, handler processes, PostgreSQL. Then start `up` again."""
    here, fault = bench.site, "all processes killed at once"
    assert here.first.process is not None
    parents = [here.first.process.pid, here.cluster.pid(), *(each.pid for each in here.second.workers)]
    killed = [
        process
        for pid in parents
        if pid is not None
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    for each in killed:
        with suppress(psutil.NoSuchProcess):  # a process whose parent died may have ended by itself
            each.kill()
    until(lambda: all(map(gone, killed)))
    here.first.ended()
    began = time.monotonic()
    here.first.up("--workers", "1", bind=here.first.url.removeprefix("http://"))
    bench.results.add(fault, "until `up` reported that it was ready", time.monotonic() - began)
    here.second.revive()
    bench.recovered(fault, accepting=LONGEST, delivering=LONGEST)


class OwnDatabase(Installation):
    """A site whose database belongs to the first host's `up`, in a data directory on that disk."""

    def __init__(self, root: Path, *, handlers: str, disk: Path) -> None:
        super().__init__(root, handlers=handlers)
        del self.first.environment["DATABASE_URL"]
        self.first.data_dir = disk / "data"
        self.first.environment["RECEIVER_DATA_DIR"] = str(self.first.data_dir)
        self.cluster = Cluster(self.first.data_dir)

    def start(self) -> None:
        """Start the site. A command that runs before `up` leaves the database running."""
        self._stack.enter_context(self.cluster.joined())
        super().start()


@contextmanager
def own_database(disk: Path) -> Iterator[Installation]:
    """Run such a site during the block."""
    made = OwnDatabase(open_directory(), handlers=effects.__name__, disk=disk)
    try:
        made.start()
        yield made
    finally:
        made.clear()
