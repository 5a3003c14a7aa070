"""Facts about the keys that the public listener serves, asked of a receiver that really runs."""

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
    """One: whichever serves, the keys are Flask's to serve."""
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
    """A new key is there without a restart; after a rotation both are, the one that signs first; a retired one not."""
    old = signing_keys.rotate(datetime.now(UTC), "ES384")["kid"]
    until(lambda: kids(server)[:1] == [old])
    new = signing_keys.rotate(datetime.now(UTC), "RS384")["kid"]
    until(lambda: kids(server)[:2] == [new, old])
    signing_keys.retire(old, datetime.now(UTC))
    until(lambda: old not in kids(server))
    assert kids(server)[0] == new


def test_only_public_parts_are_served(server: Server, signing_keys: SigningKeys) -> None:
    """No member of a private key is in the answer, of either kind of key."""
    rsa = signing_keys.rotate(datetime.now(UTC), "RS384")["kid"]
    curve = signing_keys.rotate(datetime.now(UTC), "ES384")["kid"]
    until(lambda: {rsa, curve} <= set(kids(server)))
    served = keys(ask(server))

    assert {key["kty"] for key in served} == {"RSA", "EC"}
    assert set().union(*served) == PUBLIC_MEMBERS


def test_it_may_be_kept_for_a_while(server: Server, signing_keys: SigningKeys) -> None:
    """It says how long it may be kept, and answers 304 to who has it, whatever spelling the path has."""
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
    """Nothing can be posted there."""
    assert server.ask(b"POST /.well-known/jwks.json HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").status == 405
