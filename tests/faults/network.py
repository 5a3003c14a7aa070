"""Hosts with a network each: a Linux network namespace, a link to it, and one address here that all of them reach.

What a cable does is done to the link: while it is down nothing arrives, either way, and nobody is told. Needs root and
`ip`. Names and addresses are of one run; everything is removed by its name.
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

# For measurements between two networks (RFC 2544): nobody's in earnest.
_RANGE: Final = IPv4Network("198.18.0.0/15")
_PREFIX: Final = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The way to one host. `enter` stands before a command that is to run there."""

    name: str
    enter: tuple[str, ...]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing arrives while the block runs."""
        ip("link", "set", self.name, "down")
        try:
            yield
        finally:
            ip("link", "set", self.name, "up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """`address`: ours, in the network `cidr`; `links` by the host's name."""

    address: str
    cidr: str
    links: dict[str, Link]


def program() -> str | None:
    """The path of `ip`, also for those who do not look where root does."""
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing() -> str | None:
    """Why there can be no networks here; None: there can."""
    if program() is None:
        return "`ip` is not here (on Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "root alone can make network namespaces"
    tried = subprocess.run(
        [str(program()), "netns", "add", probe := f"rr-{secrets.token_hex(3)}"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        return "network namespaces are not to be had here"
    ip("netns", "del", probe)
    return None


def ip(*arguments: str) -> str:
    """Run it; it says why when it fails."""
    done = subprocess.run([str(program()), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


@contextmanager
def network(hosts: Sequence[str]) -> Iterator[Network]:
    """A network with these hosts, and us, while the block runs."""
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
    """A network of which nobody here knows."""
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
