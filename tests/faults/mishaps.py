"""What can happen to a site: each mishap is a function that makes it happen, and returns when it is over.

Over is the cause: what it left behind mends itself, or it is found out. Processes are struck by their number; the
moment is chance's.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final

import psutil
import psycopg

from receiver.simulator.feed import FeedSimulator
from tests.faults import outages, strikes
from tests.faults.load import name_of
from tests.faults.site import Host, Site, receiver_workers
from tests.support.waiting import until

Mishap = Callable[[Site, random.Random], None]

# How long a fault lasts that does not end by itself: longer than a lease, and than the five seconds of a request.
_LONG: Final = (6.0, 8.0)
_SHORT: Final = (0.2, 2.0)


def receiver_killed(site: Site, dice: random.Random) -> None:
    """SIGKILL of a gunicorn worker."""
    _strike(receiver_workers(site.first), dice)


def receiver_killed_between_commit_and_answer(site: Site, dice: random.Random) -> None:
    """SIGKILL of the gunicorn worker after COMMIT, before the answer."""
    redox = site.target("lab").redox()
    body = redox.body("Results.New", seed=dice.randrange(1 << 40))
    held = site.first.proxy.hold_answer(name_of(body).encode())
    with (
        FeedSimulator(redox, name="unanswered", time_scale=0.02, deadline=200, ledger=site.sent["lab"]) as feed,
        _meanwhile(lambda: feed.deliver(body)),
    ):
        # What another mishap has left may keep it from ever getting there.
        if held.committed.wait(20):
            _strike(receiver_workers(site.first), dice)
        held.let_go()


def receiver_cut_between_commit_and_answer(site: Site, dice: random.Random) -> None:
    """Connection cut between COMMIT and its answer."""
    redox = site.target("lab").redox()
    body = redox.body("Results.New", seed=dice.randrange(1 << 40))
    held = site.first.proxy.hold_answer(name_of(body).encode())
    with (
        FeedSimulator(redox, name="unheard", time_scale=0.02, deadline=200, ledger=site.sent["lab"]) as feed,
        _meanwhile(lambda: feed.deliver(body)),
    ):
        held.committed.wait(20)
        site.first.proxy.cut(reset=dice.random() < 0.5)
        held.let_go()


def master_killed(site: Site, dice: random.Random) -> None:
    """SIGKILL of the gunicorn master."""
    _strike([site.first.part("receiver")], dice)


def receiver_stopped(site: Site, dice: random.Random) -> None:
    """SIGTERM of the receiver under load."""
    with suppress(ProcessLookupError):
        os.kill(site.first.part("receiver"), signal.SIGTERM)


def receiver_reloaded(site: Site, dice: random.Random) -> None:
    """SIGHUP of the receiver under load."""
    with suppress(ProcessLookupError):
        os.kill(site.first.part("receiver"), signal.SIGHUP)


def receiver_reloaded_broken(site: Site, dice: random.Random) -> None:
    """SIGHUP of the receiver with settings that do not hold."""
    file = site.first.data_dir / ".env"
    before = site.first.log.stat().st_size
    file.write_text("RECEIVER_MAX_BODY=little\n")
    try:
        receiver_reloaded(site, dice)
        with suppress(AssertionError):  # there may be no receiver at the moment
            until(lambda: site.first.told("receiver.not_reloaded", after=before), 10)
    finally:
        file.unlink()


def worker_killed(site: Site, dice: random.Random) -> None:
    """SIGKILL of a worker, on either host."""
    chosen = dice.choice([site.first.part("worker-1"), *(each.pid for each in site.second.workers)])
    _strike([chosen], dice)


def worker_stopped(site: Site, dice: random.Random) -> None:
    """SIGTERM of a worker, on either host."""
    with suppress(ProcessLookupError):
        os.kill(dice.choice([site.first.part("worker-1"), *(each.pid for each in site.second.workers)]), signal.SIGTERM)


def handler_killed(site: Site, dice: random.Random) -> None:
    """SIGKILL of a process that runs handlers."""
    _strike([each.pid for each in handler_processes(site)], dice)


def worker_frozen(site: Site, dice: random.Random) -> None:
    """A worker's host frozen while it holds lanes, and thawed after others have taken them."""
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(site.second.workers[-1].pid)
        frozen = [worker, *worker.children(recursive=True)]
        for each in frozen:
            each.suspend()
        time.sleep(dice.uniform(*_LONG))
        for each in frozen:
            with suppress(psutil.NoSuchProcess):
                each.resume()


def host_cut_off(site: Site, dice: random.Random) -> None:
    """The network of a worker's host dead while it holds lanes, and back late."""
    with _dead_network(site.second):
        time.sleep(dice.uniform(*_LONG))


def network_stalls(site: Site, dice: random.Random) -> None:
    """The network of the receiver's host dead for a moment, or longer than a request may take."""
    with _dead_network(site.first):
        time.sleep(dice.uniform(*dice.choice((_SHORT, _LONG))))


def connections_cut(site: Site, dice: random.Random) -> None:
    """Every connection to the database cut, or reset, on one host."""
    dice.choice((site.first, site.second)).proxy.cut(reset=dice.random() < 0.5)


def network_slow(site: Site, dice: random.Random) -> None:
    """Each packet a little late."""
    for host in (site.first, site.second):
        host.proxy.delay = dice.uniform(0.005, 0.05)
    time.sleep(dice.uniform(*_SHORT))
    for host in (site.first, site.second):
        host.proxy.delay = 0.0


def database_killed(site: Site, dice: random.Random) -> None:
    """PostgreSQL stopped hard under load, and started again."""
    outages.kill(site.cluster)
    time.sleep(dice.uniform(*_SHORT))
    site.cluster.start()


def database_restarted(site: Site, dice: random.Random) -> None:
    """PostgreSQL shut down and started again."""
    site.cluster.stop()
    time.sleep(dice.uniform(*_SHORT))
    site.cluster.start()


def database_frozen(site: Site, dice: random.Random) -> None:
    """PostgreSQL frozen, all of its processes."""
    with outages.frozen(site.cluster):
        time.sleep(dice.uniform(*_LONG))


def database_read_only(site: Site, dice: random.Random) -> None:
    """PostgreSQL read-only, as a standby is."""
    with outages.read_only(site.cluster):
        time.sleep(dice.uniform(*_SHORT))


def connections_taken(site: Site, dice: random.Random) -> None:
    """No connection to be had: all are taken, and those in use are cut."""
    with outages.connections_taken(site.cluster, lambda: [each.proxy.cut() for each in (site.first, site.second)]):
        time.sleep(dice.uniform(*_SHORT))


def backends_ended(site: Site, dice: random.Random) -> None:
    """Every session ended by an administrator."""
    with psycopg.connect(outages.address(site.cluster), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = "
            "'client backend' AND pid <> pg_backend_pid()"
        )


def rows_locked(site: Site, dice: random.Random) -> None:
    """Somebody holds the locks that a commit wants, longer than a request may take."""
    with psycopg.connect(outages.address(site.cluster)) as connection:
        connection.execute("LOCK TABLE payloads")
        time.sleep(dice.uniform(*_LONG))


MISHAPS: Final[tuple[Mishap, ...]] = (
    receiver_killed,
    receiver_killed_between_commit_and_answer,
    receiver_cut_between_commit_and_answer,
    master_killed,
    receiver_stopped,
    receiver_reloaded,
    receiver_reloaded_broken,
    worker_killed,
    worker_stopped,
    handler_killed,
    worker_frozen,
    host_cut_off,
    network_stalls,
    connections_cut,
    network_slow,
    database_killed,
    database_restarted,
    database_frozen,
    database_read_only,
    connections_taken,
    backends_ended,
    rows_locked,
    strikes.receiver_struck,
    strikes.worker_struck,
    strikes.transactions_refused,
    strikes.deadlocked,
    strikes.plugin_broken,
    strikes.lane_held,
)


def handler_processes(site: Site) -> list[psutil.Process]:
    """Every process that runs handlers of this site, whoever its parent is now."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if (
                "receiver.worker.handler_process" in each.cmdline()
                and each.status() != psutil.STATUS_ZOMBIE
                and each.environ().get("EFFECTS") == str(site.effects)
            ):
                found.append(each)
    return found


def _strike(pids: list[int], dice: random.Random) -> None:
    if pids:
        time.sleep(dice.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.kill(dice.choice(pids), signal.SIGKILL)


@contextmanager
def _dead_network(host: Host) -> Iterator[None]:
    host.proxy.freeze()
    try:
        yield
    finally:
        host.proxy.thaw()


@contextmanager
def _meanwhile(run: Callable[[], object]) -> Iterator[None]:
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        yield
        running.result()
