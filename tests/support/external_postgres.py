"""A real PostgreSQL that listens on TCP and asks for passwords, as an external one does.

Slow to start: a test that needs any database uses `tests.support.postgres`.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from receiver.database.embedded.binaries import binaries
from receiver.database.embedded.cluster import Cluster
from receiver.database.embedded.server_settings import ENVIRONMENT, ROLE
from tests.support.ports import free_port
from tests.support.postgres import QUICK, open_directory
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import until

PASSWORD = "a made-up password"
# The account `plain` may connect with or without TLS, `secret` only with it.
_HBA = """\
local   all all                        trust
host    all plain  127.0.0.1/32        scram-sha-256
hostssl all secret 127.0.0.1/32        scram-sha-256
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalPostgres:
    """A server at 127.0.0.1:`port`, with the accounts `plain` and `secret` and a database `receiver`."""

    port: int
    directory: Path
    socket: Path

    def url(
        self,
        user: str = "plain",
        *,
        password: str = PASSWORD,
        host: str = "127.0.0.1",
        database: str = "receiver",
        port: int | None = None,
        **options: str,
    ) -> str:
        """DATABASE_URL as an operator would write it."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        written = password.replace(" ", "%20")
        return f"postgresql://{user}:{written}@{host}:{port or self.port}/{database}{'?' if query else ''}{query}"

    def execute(self, *statements: str) -> None:
        """Run statements as the superuser."""
        with psycopg.connect(
            host=str(self.socket), port=self.port, user=ROLE, dbname="postgres", autocommit=True
        ) as connection:
            for statement in statements:
                connection.execute(statement)


@contextmanager
def tls_front(server: ExternalPostgres, context: ssl.SSLContext) -> Iterator[int]:
    """Listen on a port of 127.0.0.1 where the server is reached by TLS, which its own build does not support.

    Accepts the request for TLS (PostgreSQL: Message Flow, SSL Session Encryption) and forwards what follows.
    """

    def greet(client: socket.socket) -> socket.socket:
        client.recv(8)
        client.sendall(b"S")
        return context.wrap_socket(client, server_side=True)

    with tcp_proxy(lambda: socket.create_connection(("127.0.0.1", server.port)), greet=greet) as proxy:
        yield proxy.port


@contextmanager
def external_postgres() -> Iterator[ExternalPostgres]:
    """Run one while the block runs, without TLS: its build has none."""
    home = open_directory()
    cluster = Cluster(home / "data", options=QUICK)
    try:
        with cluster.joined():
            directory = cluster.directory
        (directory / "pg_hba.conf").write_text(_HBA)
        owner = directory.stat()
        sockets = home / "socket"
        sockets.mkdir()
        os.chown(sockets, owner.st_uid, owner.st_gid)
        port = free_port()
        settings = {
            **QUICK,
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(sockets),
            "max_connections": "20",
        }
        account = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        server = subprocess.Popen(  # type: ignore[call-overload]
            [binaries() / "postgres", "-D", directory, *(f"-c{name}={value}" for name, value in settings.items())],
            cwd=directory,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **account,
        )
        try:
            found = ExternalPostgres(port=port, directory=directory, socket=sockets)
            until(lambda: _answers(found))
            found.execute(
                *(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'" for name in ("plain", "secret")),
                "CREATE DATABASE receiver OWNER plain",
            )
            yield found
        finally:
            server.terminate()
            server.wait(60)
    finally:
        shutil.rmtree(home)


def _answers(server: ExternalPostgres) -> bool:
    try:
        server.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True
