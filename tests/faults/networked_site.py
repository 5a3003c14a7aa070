"""A site whose worker hosts have their own networks, which can be cut, and processes, which can be frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from receiver.database.embedded.cluster import Cluster
from receiver.database.embedded.server_settings import DATABASE, PORT, ROLE
from tests.faults import effects
from tests.faults.network import Network, network
from tests.faults.site import Host, Installation
from tests.support.postgres import open_directory


class NetworkedInstallation(Installation):
    """A site whose worker hosts have their own networks. The receiver's host is this machine."""

    def __init__(self, root: Path, hosts: Network) -> None:
        super().__init__(root, handlers=effects.__name__)
        self._network = hosts
        self.cluster = Cluster(root / "postgres", options={"max_connections": "200", "listen_addresses": hosts.address})
        self.third = self._host("third")
        self.distant: Mapping[str, Host] = {"second": self.second, "third": self.third}
        for name, host in self.distant.items():
            host.prefix = hosts.links[name].enter
            gates = host.root / "gates"
            gates.mkdir()
            host.environment |= {
                "DATABASE_URL": f"postgresql://{ROLE}@{hosts.address}:{PORT}/{DATABASE}",
                "GATES": str(gates),
            }

    def start(self) -> None:
        """Start the site, and have PostgreSQL accept connections from the hosts' network."""
        super().start()
        with (self.cluster.directory / "pg_hba.conf").open("a") as file:
            file.write(f"host {DATABASE} {ROLE} {self._network.cidr} trust\n")
        self.rows("SELECT pg_reload_conf()")

    def cut(self, host: Host) -> AbstractContextManager[None]:
        """Cut the link of that host during the block."""
        return next(self._network.links[name].cut() for name, each in self.distant.items() if each is host)


@contextmanager
def frozen(host: Host) -> Iterator[None]:
    """Freeze all processes of the host's workers during the block. The host's system runs on."""
    still: list[psutil.Process] = []
    for worker in host.workers:
        # Freeze the worker first, so that it starts no other process.
        for process in (psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                still.append(process)
    try:
        yield
    finally:
        for process in still:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@contextmanager
def networked_site() -> Iterator[NetworkedInstallation]:
    """Run such a site during the block, with only the database started."""
    with ExitStack() as stack:
        hosts = stack.enter_context(network(("second", "third")))
        made = NetworkedInstallation(open_directory(), hosts)
        stack.callback(made.clear)
        made.start()
        yield made
