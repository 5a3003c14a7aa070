"""A real PostgreSQL that listens on TCP and asks for passwords, as an external one does.

Not for speed: a test that needs any database takes `tests.support.postgres`.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import psycopg

from receiver.database.embedded.cluster import ENVIRONMENT, ROLE, Cluster, binaries
from tests.support.postgres import QUICK, open_directory
from tests.support.waiting import until

PASSWORD = "a made-up password"
# The account `plain` may connect as it likes, `secret` by TLS alone.
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
        """As the superuser."""
        with psycopg.connect(
            host=str(self.socket), port=self.port, user=ROLE, dbname="postgres", autocommit=True
        ) as connection:
            for statement in statements:
                connection.execute(statement)


@contextmanager
def tls_front(server: ExternalPostgres, context: ssl.SSLContext) -> Iterator[int]:
    """A port of 127.0.0.1 where the server is reached by TLS: its own build speaks none.

    To the request for TLS it says yes (PostgreSQL: Message Flow, SSL Session Encryption); what follows is handed on.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def hand_on(begin: socket.socket, end: socket.socket) -> None:
        with suppress(OSError):
            while data := begin.recv(65_536):
                end.sendall(data)
        with suppress(OSError):
            end.shutdown(socket.SHUT_WR)

    def serve(plain: socket.socket) -> None:
        with plain, suppress(OSError):
            plain.recv(8)
            plain.sendall(b"S")
            with (
                context.wrap_socket(plain, server_side=True) as client,
                socket.create_connection(("127.0.0.1", server.port)) as behind,
            ):
                back = Thread(target=hand_on, args=(behind, client), daemon=True)
                back.start()
                hand_on(client, behind)
                back.join(10)

    def accept() -> None:
        with suppress(OSError):
            while True:
                Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)


@contextmanager
def external_postgres() -> Iterator[ExternalPostgres]:
    """One while the block runs; it speaks no TLS, which its build does not have."""
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
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
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
