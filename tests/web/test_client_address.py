"""The client's address, with and without proxies."""

from __future__ import annotations

import pytest

from receiver.web.client_address import ClientAddresses

TRUSTED = ("10.0.0.0/8", "192.0.2.1", "2001:db8::/32")


@pytest.mark.parametrize(
    ("remote", "forwarded", "name"),
    [
        ("203.0.113.7", None, "203.0.113.7"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),  # not a trusted proxy
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),  # the client has written what is further left
        ("10.0.0.1", "1.1.1.1,198.51.100.1,192.0.2.1,10.1.1.1", "198.51.100.1"),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", "10.0.0.2"),
        ("10.0.0.1", "1.1.1.1, nonsense", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, nonsense, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "unknown", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.1:4711", "198.51.100.1"),
        ("10.0.0.1", "[2001:db9::1]:4711", "2001:db9::1"),
        ("10.0.0.1", "2001:db9::1", "2001:db9::1"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("2001:db8::1", "198.51.100.1", "198.51.100.1"),
        ("fe80::1%eth0", None, "fe80::1"),
        ("", "198.51.100.1", "198.51.100.1"),
        ("", None, "unknown"),
        ("nonsense", "198.51.100.1", "unknown"),
    ],
)
def test_name(remote: str, forwarded: str | None, name: str) -> None:
    """X-Forwarded-For is read from the right, as long as each hop is a trusted proxy."""
    assert ClientAddresses(TRUSTED).name(remote, forwarded) == name


@pytest.mark.parametrize(
    ("remote", "trusted"),
    [("10.1.2.3", True), ("192.0.2.2", False), ("", True), ("nonsense", False), ("::ffff:192.0.2.1", True)],
)
def test_trusted(remote: str, trusted: bool) -> None:
    """A proxy in the list is trusted, and so is a Unix socket, which no other host can reach."""
    assert ClientAddresses(TRUSTED).trusted(remote) is trusted


def test_no_proxy_is_trusted_by_default() -> None:
    """Without a list no proxy is trusted, not even this host."""
    assert ClientAddresses(()).name("127.0.0.1", "198.51.100.1") == "127.0.0.1"
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 network"):
        ClientAddresses(["proxy.example"])
