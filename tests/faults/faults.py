"""Faults that the rounds inject into a site. Each is a function that returns when the cause is over.

The site must recover by itself from what a fault leaves behind. The moment at which a process is hit is random.
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
from tests.faults import fail_points, handler_faults, outages, transaction_faults
from tests.faults.load import name_of
from tests.faults.site import Host, Installation, receiver_workers
from tests.support.waiting import until

Fault = Callable[[Installation, random.Random], None]

# Seconds that a fault lasts which does not end by itself: longer than a lease, and than a request may take (5 s).
_LONG: Final = (6.0, 8.0)
_SHORT: Final = (0.2, 2.0)


def receiver_killed(site: Installation, dice: random.Random) -> None:
    """SIGKILL of a gunicorn worker."""
    _kill_one(receiver_workers(site.first), dice)


def receiver_killed_between_commit_and_response(site: Installation, dice: random.Random) -> None:
    """SIGKILL of a gunicorn worker after COMMIT, before it answers the request."""
    redox = site.target("lab").redox()
    body = redox.body("Results.New", seed=dice.randrange(1 << 40))
    held = site.first.proxy.hold_answer(name_of(body).encode())
    with (
        FeedSimulator(redox, name="unanswered", time_scale=0.02, deadline=200, ledger=site.sent["lab"]) as feed,
        _meanwhile(lambda: feed.deliver(body)),
    ):
        # An earlier fault may keep the message from reaching COMMIT in time.
        if held.committed.wait(20):
            _kill_one(receiver_workers(site.first), dice)
        held.release()


def receiver_cut_between_commit_and_response(site: Installation, dice: random.Random) -> None:
    """Database connection cut after COMMIT, before PostgreSQL's reply arrives."""
    redox = site.target("lab").redox()
    body = redox.body("Results.New", seed=dice.randrange(1 << 40))
    held = site.first.proxy.hold_answer(name_of(body).encode())
    with (
        FeedSimulator(redox, name="reply-lost", time_scale=0.02, deadline=200, ledger=site.sent["lab"]) as feed,
        _meanwhile(lambda: feed.deliver(body)),
    ):
        held.committed.wait(20)
        site.first.proxy.cut(reset=dice.random() < 0.5)
        held.release()


def master_killed(site: Installation, dice: random.Random) -> None:
    """SIGKILL of the gunicorn master."""
    _kill_one([site.first.part("receiver")], dice)


def receiver_stopped(site: Installation, dice: random.Random) -> None:
    """SIGTERM of the receiver under load."""
    with suppress(ProcessLookupError):
        os.kill(site.first.part("receiver"), signal.SIGTERM)


def receiver_reloaded(site: Installation, dice: random.Random) -> None:
    """SIGHUP of the receiver under load."""
    with suppress(ProcessLookupError):
        os.kill(site.first.part("receiver"), signal.SIGHUP)


def receiver_reloaded_with_invalid_settings(site: Installation, dice: random.Random) -> None:
    """SIGHUP of the receiver with an invalid setting."""
    file = site.first.data_dir / ".env"
    before = site.first.log.stat().st_size
    file.write_text("RECEIVER_MAX_BODY=little\n")
    try:
        receiver_reloaded(site, dice)
        with suppress(AssertionError):  # an earlier fault may have ended the receiver
            until(lambda: site.first.log_lines("receiver.not_reloaded", after=before), seconds=10)
    finally:
        file.unlink()


def worker_killed(site: Installation, dice: random.Random) -> None:
    """SIGKILL of a delivery worker, on either host."""
    chosen = dice.choice([site.first.part("worker-1"), *(each.pid for each in site.second.workers)])
    _kill_one([chosen], dice)


def worker_stopped(site: Installation, dice: random.Random) -> None:
    """SIGTERM of a delivery worker, on either host."""
    with suppress(ProcessLookupError):
        os.kill(dice.choice([site.first.part("worker-1"), *(each.pid for each in site.second.workers)]), signal.SIGTERM)


def handler_killed(site: Installation, dice: random.Random) -> None:
    """SIGKILL of a handler process."""
    _kill_one([each.pid for each in handler_processes(site)], dice)


def worker_frozen(site: Installation, dice: random.Random) -> None:
    """A delivery worker frozen while it holds lanes, and resumed after its leases expired."""
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(site.second.workers[-1].pid)
        frozen = [worker, *worker.children(recursive=True)]
        for each in frozen:
            each.suspend()
        time.sleep(dice.uniform(*_LONG))
        for each in frozen:
            with suppress(psutil.NoSuchProcess):
                each.resume()


def host_cut_off(site: Installation, dice: random.Random) -> None:
    """The network of the worker's host down while it holds lanes, and up again after its leases expired."""
    with _network_down(site.second):
        time.sleep(dice.uniform(*_LONG))


def network_stalls(site: Installation, dice: random.Random) -> None:
    """The network of the receiver's host down, briefly or for longer than a request may take."""
    with _network_down(site.first):
        time.sleep(dice.uniform(*dice.choice((_SHORT, _LONG))))


def connections_cut(site: Installation, dice: random.Random) -> None:
    """Every database connection of one host closed or reset."""
    dice.choice((site.first, site.second)).proxy.cut(reset=dice.random() < 0.5)


def network_slow(site: Installation, dice: random.Random) -> None:
    """Every packet delayed by 5 to 50 ms."""
    for host in (site.first, site.second):
        host.proxy.delay = dice.uniform(0.005, 0.05)
    time.sleep(dice.uniform(*_SHORT))
    for host in (site.first, site.second):
        host.proxy.delay = 0.0


def database_killed(site: Installation, dice: random.Random) -> None:
    """SIGKILL of PostgreSQL under load, and a restart."""
    outages.kill(site.cluster)
    time.sleep(dice.uniform(*_SHORT))
    site.cluster.start()


def database_restarted(site: Installation, dice: random.Random) -> None:
    """PostgreSQL shut down under load, and started again."""
    site.cluster.stop()
    time.sleep(dice.uniform(*_SHORT))
    site.cluster.start()


def database_frozen(site: Installation, dice: random.Random) -> None:
    """All PostgreSQL processes frozen."""
    with outages.frozen(site.cluster):
        time.sleep(dice.uniform(*_LONG))


def database_read_only(site: Installation, dice: random.Random) -> None:
    """PostgreSQL read-only, as a standby is."""
    with outages.read_only(site.cluster):
        time.sleep(dice.uniform(*_SHORT))


def connections_taken(site: Installation, dice: random.Random) -> None:
    """No free database connection: all are taken, and those in use are cut."""
    with outages.connections_taken(site.cluster, lambda: [each.proxy.cut() for each in (site.first, site.second)]):
        time.sleep(dice.uniform(*_SHORT))


def sessions_terminated(site: Installation, dice: random.Random) -> None:
    """Every database session terminated by an administrator."""
    with psycopg.connect(outages.address(site.cluster), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = "
            "'client backend' AND pid <> pg_backend_pid()"
        )


def payloads_locked(site: Installation, dice: random.Random) -> None:
    """A lock that blocks every commit, held for longer than a request may take."""
    with psycopg.connect(outages.address(site.cluster)) as connection:
        connection.execute("LOCK TABLE payloads")
        time.sleep(dice.uniform(*_LONG))


FAULTS: Final[tuple[Fault, ...]] = (
    receiver_killed,
    receiver_killed_between_commit_and_response,
    receiver_cut_between_commit_and_response,
    master_killed,
    receiver_stopped,
    receiver_reloaded,
    receiver_reloaded_with_invalid_settings,
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
    sessions_terminated,
    payloads_locked,
    fail_points.receiver_at_fail_point,
    fail_points.worker_at_fail_point,
    transaction_faults.transactions_fail,
    transaction_faults.deadlocks,
    handler_faults.plugin_broken,
    handler_faults.lane_held,
)


def handler_processes(site: Installation) -> list[psutil.Process]:
    """Return every handler process of this site, whatever its parent is now."""
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


def _kill_one(pids: list[int], dice: random.Random) -> None:
    if pids:
        time.sleep(dice.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.kill(dice.choice(pids), signal.SIGKILL)


@contextmanager
def _network_down(host: Host) -> Iterator[None]:
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
