"""Outages of PostgreSQL for the duration of a block: frozen, read-only, out of connections, out of disk.

Afterwards only the cause ends. The site must recover by itself from the rest.
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

# More connections than the server of a site allows.
_MOST = 300


def address(cluster: Cluster) -> str:
    """Return the cluster's URL for libpq."""
    return make_url(cluster.url).set(drivername="postgresql").render_as_string()


def kill(cluster: Cluster) -> None:
    """Send SIGKILL to the postmaster, and wait until it has ended."""
    pid = cluster.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    """Freeze all processes of PostgreSQL."""
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
    """Refuse writes, as a standby does."""
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
    """Take all connections. `cut` ends those that are in use."""
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
    """Mount a file system of that size, in memory, on the directory. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0711", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@contextmanager
def disk_full(directory: Path) -> Iterator[None]:
    """Fill the disk that the directory is on with a file."""
    filler = directory / "filler"
    try:
        fill(filler)
        yield
    finally:
        filler.unlink(missing_ok=True)


def fill(filler: Path) -> None:
    """Extend the file until its disk is full, to the last page."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
