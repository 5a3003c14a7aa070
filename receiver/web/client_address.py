"""The client's address: that of the connection, or the one that a trusted proxy reports.

Any client can send X-Forwarded-For. Only the part that trusted proxies have appended, at the right end, is reliable.
Must not use any of it if the connection does not come from a trusted proxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

# RFC 7239 section 6: an address with a port, an IPv6 address in brackets; proxies write both into X-Forwarded-For too.
_NODE = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")


class ClientAddresses:
    """Names clients. `trusted`: addresses and networks of proxies. Raises ValueError when one is not valid."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._trusted: tuple[IPv4Network | IPv6Network, ...] = tuple(ip_network(each, strict=False) for each in trusted)
        # Requests come from few addresses, and parsing an address is slow.
        self._known = lru_cache(1024)(self._look)

    def _look(self, remote: str) -> tuple[IPv4Address | IPv6Address | None, bool, str]:
        """Return the address of the connection, whether it is trusted, and its text."""
        peer = _address(remote)
        return (peer, not remote, "unknown") if peer is None else (peer, self._trusts(peer), str(peer))

    def trusted(self, remote: str) -> bool:
        """Whether a connection comes from a trusted proxy, or over a Unix socket, which has no address."""
        return self._known(remote)[1]

    def name(self, remote: str, forwarded: str | None) -> str:
        """The peer's address: `remote`, or the rightmost of X-Forwarded-For that is not itself a trusted proxy."""
        peer, trusted, name = self._known(remote)
        if forwarded is None or not trusted:
            return name
        for hop in reversed(forwarded.split(",")):
            if peer is not None and not self._trusts(peer):
                break
            before = _address(hop.strip(" \t"))
            if before is None:
                break
            peer = before
        return "unknown" if peer is None else str(peer)

    def _trusts(self, peer: IPv4Address | IPv6Address) -> bool:
        return any(peer in network for network in self._trusted)


# Most requests come from the same few addresses. The cache is bounded for the others.
@lru_cache(maxsize=256)
def _address(text: str) -> IPv4Address | IPv6Address | None:
    node = _NODE.fullmatch(text)
    try:
        address = ip_address((node[1] or node[2]) if node else text.partition("%")[0])
    except ValueError:
        return None
    # A listener on :: sees IPv4 peers as ::ffff:a.b.c.d.
    return getattr(address, "ipv4_mapped", None) or address
