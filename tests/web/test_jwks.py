"""The public keys of a running receiver."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from receiver.keyring import Keyring
from receiver.storage.registry.signing_keys import SigningKeys
from tests.support.server import Answer, Server
from tests.support.site import Site
from tests.support.waiting import until

PUBLIC_MEMBERS = {"kty", "n", "e", "crv", "x", "y", "kid", "alg", "use"}


@pytest.fixture(scope="module")
def server_mode() -> str:
    """One mode: Flask serves the keys in both."""
    return "flask"


@pytest.fixture
def signing_keys(site: Site, keyring: Keyring) -> SigningKeys:
    return SigningKeys(site.engine, keyring, actor="tester@test")


def ask(server: Server, path: str = "/.well-known/jwks.json", **headers: str) -> Answer:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return server.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())


def kids(server: Server) -> list[str]:
    return [key["kid"] for key in keys(ask(server))]


def keys(answer: Answer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(answer.body)["keys"]
    return found


def test_a_key_is_served_as_long_as_it_is_not_retired(server: Server, signing_keys: SigningKeys) -> None:
    """A new key is served without a restart. After a rotation both are, the signing one first; a retired one is not."""
    old = signing_keys.rotate(datetime.now(UTC), "ES384")["kid"]
    until(lambda: kids(server)[:1] == [old])
    new = signing_keys.rotate(datetime.now(UTC), "RS384")["kid"]
    until(lambda: kids(server)[:2] == [new, old])
    signing_keys.retire(old, datetime.now(UTC))
    until(lambda: old not in kids(server))
    assert kids(server)[0] == new


def test_only_public_parts_are_served(server: Server, signing_keys: SigningKeys) -> None:
    """The reply has no private member of either kind of key."""
    rsa = signing_keys.rotate(datetime.now(UTC), "RS384")["kid"]
    curve = signing_keys.rotate(datetime.now(UTC), "ES384")["kid"]
    until(lambda: {rsa, curve} <= set(kids(server)))
    served = keys(ask(server))

    assert {key["kty"] for key in served} == {"RSA", "EC"}
    assert set().union(*served) == PUBLIC_MEMBERS


def test_it_may_be_cached(server: Server, signing_keys: SigningKeys) -> None:
    """It has a maximum age, and gets 304 with its ETag, for every spelling of the path."""
    kid = signing_keys.rotate(datetime.now(UTC), "ES384")["kid"]
    until(lambda: kid in kids(server))
    whole = ask(server)

    assert whole.headers["cache-control"] == "public, max-age=300"
    assert whole.headers["content-type"] == "application/json"
    assert "set-cookie" not in whole.headers
    again = ask(server, "//.well-known/jwks.json", if_none_match=whole.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert ask(server, if_none_match='"another"').status == 200


def test_it_is_read_only(server: Server) -> None:
    """POST gets 405."""
    assert server.ask(b"POST /.well-known/jwks.json HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").status == 405
