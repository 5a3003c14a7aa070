"""Hosts with their own networks: a Linux network namespace and a link for each, and one address of this machine.

Cutting a link has the effect of an unplugged cable: nothing arrives in either direction, and no connection is closed.
Needs root and `ip`. Names and addresses are unique to a run, and all are removed at the end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Final

# Reserved for measurements between networks (RFC 2544): not in use.
_RANGE: Final = IPv4Network("198.18.0.0/15")
_PREFIX: Final = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The link to one host. `enter`: the prefix of a command that runs on it."""

    name: str
    enter: tuple[str, ...]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Take the link down during the block."""
        ip("link", "set", self.name, "down")
        try:
            yield
        finally:
            ip("link", "set", self.name, "up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network. `address`: of this machine, in `cidr`. `links`: by host."""

    address: str
    cidr: str
    links: dict[str, Link]


def program() -> str | None:
    """Return the path of `ip`, which may be outside of the PATH of a non-root account."""
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing() -> str | None:
    """Return why networks cannot be made here, or None if they can."""
    if program() is None:
        return "`ip` is not installed (on Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    tried = subprocess.run(
        [str(program()), "netns", "add", probe := f"rr-{secrets.token_hex(3)}"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        return "this system does not allow network namespaces"
    ip("netns", "del", probe)
    return None


def ip(*arguments: str) -> str:
    """Run `ip`. Returns its output."""
    done = subprocess.run([str(program()), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


@contextmanager
def network(hosts: Sequence[str]) -> Iterator[Network]:
    """Make a network of this machine and these hosts for the duration of the block."""
    run = secrets.token_hex(3)
    free = _free()
    ours, *theirs = list(free.hosts())[: len(hosts) + 1]
    with ExitStack() as stack:

        def undo(*arguments: str) -> None:
            stack.callback(subprocess.run, [str(program()), *arguments], capture_output=True, check=False)

        bridge = f"rr{run}"
        ip("link", "add", bridge, "type", "bridge")
        undo("link", "del", bridge)
        ip("addr", "add", f"{ours}/{free.prefixlen}", "dev", bridge)
        ip("link", "set", bridge, "up")
        links = {}
        for number, (host, address) in enumerate(zip(hosts, theirs, strict=True)):
            space, link, there = f"rr{run}-{host}", f"rr{run}h{number}", f"rr{run}p{number}"
            ip("netns", "add", space)
            undo("netns", "del", space)
            ip("link", "add", link, "type", "veth", "peer", "name", there)
            undo("link", "del", link)
            ip("link", "set", link, "master", bridge, "up")
            ip("link", "set", there, "netns", space)
            for inside in (
                ("addr", "add", f"{address}/{free.prefixlen}", "dev", there),
                ("link", "set", there, "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", space, *inside)
            links[host] = Link(name=link, enter=(str(program()), "netns", "exec", space))
        yield Network(address=str(ours), cidr=str(free), links=links)


def _free() -> IPv4Network:
    """Return a network that overlaps no route of this machine."""
    taken = [
        IPv4Network(words[0])
        for line in ip("-4", "route", "show", "table", "all").splitlines()
        if (words := line.split()) and words[0][0].isdigit()
    ]
    while True:
        chosen = IPv4Network(
            (
                int(_RANGE.network_address) + (secrets.randbelow(1 << (_PREFIX - _RANGE.prefixlen)) << (32 - _PREFIX)),
                _PREFIX,
            )
        )
        if not any(chosen.overlaps(each) for each in taken):
            return chosen
