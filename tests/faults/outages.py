"""What befalls PostgreSQL while a block runs: frozen, read-only, out of connections, away, out of disk.

Afterwards the cause is over, and nothing else is mended: what it left behind mends itself, or it is found out.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
from sqlalchemy import make_url

from receiver.database.embedded.cluster import Cluster
from tests.support.waiting import until

# More than a server of a site takes.
_MOST = 300


def address(cluster: Cluster) -> str:
    """The cluster's URL as libpq takes it."""
    return make_url(cluster.url).set(drivername="postgresql").render_as_string()


def kill(cluster: Cluster) -> None:
    """SIGKILL of the postmaster, and wait until it is no more."""
    pid = cluster.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    """All of its processes stand still."""
    pid = cluster.pid()
    assert pid is not None
    postmaster = psutil.Process(pid)
    processes = [postmaster, *postmaster.children(recursive=True)]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.suspend()
    try:
        yield
    finally:
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                each.resume()


@contextmanager
def read_only(cluster: Cluster) -> Iterator[None]:
    """It takes no writes, as a standby does not."""
    with psycopg.connect(address(cluster), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")


@contextmanager
def connections_taken(cluster: Cluster, cut: Callable[[], object]) -> Iterator[None]:
    """No connection is to be had; `cut` ends those that are in use."""
    taken: list[psycopg.Connection] = []

    def take() -> None:
        with suppress(psycopg.OperationalError):
            while len(taken) < _MOST:
                taken.append(psycopg.connect(address(cluster)))

    take()
    cut()
    take()
    try:
        yield
    finally:
        for each in taken:
            each.close()


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    """The directory is a file system of that size, in memory. Root's alone."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0711", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@contextmanager
def disk_full(directory: Path) -> Iterator[None]:
    """Nothing is left of the disk that the directory is on: a file takes all of it."""
    filler = directory / "filler"
    try:
        fill(filler)
        yield
    finally:
        filler.unlink(missing_ok=True)


def fill(filler: Path) -> None:
    """Have the file take what is left of its disk, to the last page that is to be had."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
