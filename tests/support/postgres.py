"""One throw-away PostgreSQL for a test process, and databases in it.

For tests only: it gives up durability for speed. However the process ends, SIGKILL included, the server ends and its
directory is removed: a watchdog in a session of its own waits for the end of a pipe that closes with us.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from receiver.database.embedded.cluster import Cluster

# A server that does not stop within ten seconds is left, but its directory is removed.
WATCHDOG = """
read -r _
pid=$(head -n 1 "$1/postmaster.pid") && kill -QUIT "$pid"
n=0; while [ -n "$pid" ] && kill -0 "$pid" && [ $n -lt 200 ]; do n=$((n + 1)); sleep 0.05; done
rm -rf -- "$1" "$2"
"""

QUICK = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "200"}


def open_directory() -> Path:
    """Make a directory under the temporary one that every account can pass through, so that root's tests run there."""
    made = Path(tempfile.mkdtemp(prefix="redox-receiver-tests-"))
    made.chmod(0o711)
    return made


@cache
def session_cluster() -> Cluster:
    """Start this process's cluster at the first call; it ends with the process."""
    data_dir = open_directory()
    cluster = Cluster(data_dir, options=QUICK)
    cluster.start()
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", WATCHDOG, "sh", cluster.directory, data_dir],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        assert watchdog.stdin is not None
        watchdog.stdin.close()
        watchdog.wait(30)

    owner = os.getpid()
    atexit.register(lambda: end() if os.getpid() == owner else None)  # a forked child is not the process
    return cluster


def new_database(template: str | None = None) -> str:
    """Make a database and return its URL: empty, or a copy of the one at the URL `template`, which must be unused."""
    name = f"t_{uuid4().hex}"
    source = make_url(template).database if template else "template0"
    assert source is not None
    _execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source)))
    return make_url(session_cluster().url).set(database=name).render_as_string()


def drop_database(url: str) -> None:
    """Drop a database that `new_database` made, and end its connections."""
    name = make_url(url).database
    assert name is not None
    _execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _execute(statement: sql.Composed) -> None:
    address = make_url(session_cluster().url)
    with psycopg.connect(
        host=str(address.query["host"]),
        port=str(address.query["port"]),
        user=address.username,
        dbname="postgres",
        autocommit=True,
    ) as connection:
        connection.execute(statement)
