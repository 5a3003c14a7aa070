"""Fetched keys, renewed on a timer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.outbound.jwks import fetch
from receiver.storage.key_sets import KeyFetcher
from tests.protocol.verification.issuers import RSA_FIRST, RSA_SECOND, PrivateKey, jwk
from tests.storage.door import DESTINATION, Door
from tests.testing.door import Door as Site
from tests.testing.door import answer


def document(**keys: PrivateKey) -> bytes:
    return json.dumps({"keys": [jwk(key, kid=kid) for kid, key in keys.items()]}).encode()


def add(door: Door, url: str) -> int:
    return door.registration.add_credential(
        DESTINATION, door.now, "jwt", {"issuers": ["i"], "audiences": ["a"], "jwks_url": url}, None, label=None,
        expires_at=None, fetched=document(a=RSA_FIRST))


def due(door: Door) -> None:
    door.rows("UPDATE key_sets SET tried_at = now() - interval '1 hour'")


def kids(door: Door) -> list[str | None]:
    return [key.kid for each in door.destination.credentials if hasattr(each, "rules") for key in each.rules.keys]


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not become so in time"
        time.sleep(0.02)


def test_what_is_due_is_fetched(door: Door, engine: Engine, keyring: Keyring) -> None:
    """New keys at the URL are the new keys here; what was fetched lately is left alone."""
    with Site(answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys?for=us")
        fetcher = KeyFetcher(engine, keyring, fetch, every=300)
        assert not fetcher.renew_one()
        due(door)
        assert fetcher.renew_one()
        assert not fetcher.renew_one()
        (request,) = site.received
    assert kids(door) == ["b"]
    assert request.target == "/keys?for=us"
    assert request.headers["accept-encoding"] == "identity"


def test_when_it_is_due_is_asked_by_the_database_s_clock(door: Door, engine: Engine, keyring: Keyring) -> None:
    """A host whose clock is an hour ahead does not put the next fetch off by an hour."""
    door.registration.add_credential(
        DESTINATION, door.now + timedelta(hours=1), "jwt",
        {"issuers": ["i"], "audiences": ["a"], "jwks_url": "https://keys.example/"}, None, label=None, expires_at=None,
        fetched=document(a=RSA_FIRST))
    assert door.value("SELECT tried_at <= now() FROM key_sets")


def test_what_fails_keeps_the_keys(door: Door, engine: Engine, keyring: Keyring) -> None:
    """An error, garbage, a redirect, too much, nobody there: the old keys stay, and why is written down."""
    with Site(answer(500), answer(200, b"<html>"), answer(302), answer(200, b" " * 300_000), answer(404)) as site:
        add(door, f"{site.url}/keys")
        fetcher = KeyFetcher(engine, keyring, fetch, every=300)
        failures = []
        for _ in range(5):
            due(door)
            assert fetcher.renew_one()
            failures.append(door.value("SELECT failure FROM key_sets"))
            assert kids(door) == ["a"]
    due(door)
    assert fetcher.renew_one()
    failures.append(door.value("SELECT failure FROM key_sets"))
    assert all(failures)
    assert "500" in failures[0]
    assert "neither PEM nor a JWKS" in failures[1]
    assert "302" in failures[2]
    assert "larger" in failures[3]
    assert kids(door) == ["a"]


def test_a_failure_is_over_when_it_works_again(door: Door, engine: Engine, keyring: Keyring) -> None:
    """What is fetched well has no failure."""
    with Site(answer(500), answer(200, document(a=RSA_FIRST))) as site:
        add(door, f"{site.url}/keys")
        fetcher = KeyFetcher(engine, keyring, fetch, every=300)
        for expected in (True, False):
            due(door)
            assert fetcher.renew_one()
            assert (door.value("SELECT failure FROM key_sets") is not None) is expected


def test_nobody_s_keys_are_not_fetched(door: Door, engine: Engine, keyring: Keyring) -> None:
    """When the last credential that names a URL is revoked, nobody asks there any more."""
    with Site() as site:
        number = add(door, f"{site.url}/keys")
        door.registration.revoke_credential(number, door.now)
        due(door)
        assert not KeyFetcher(engine, keyring, fetch, every=300).renew_one()
        assert site.received == []


def test_one_of_many_processes_fetches(door: Door, engine: Engine, keyring: Keyring) -> None:
    """However many look at the same time, the URL is asked once."""
    with Site(answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys")
        due(door)
        threads = [threading.Thread(target=KeyFetcher(engine, keyring, fetch, every=300).renew_one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(site.received) == 1


def test_the_timer(door: Door, engine: Engine, keyring: Keyring) -> None:
    """Started, it fetches by itself, goes on after failures, and stops when it is told to."""
    with Site(answer(500), answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys")
        fetcher = KeyFetcher(engine, keyring, fetch, every=0.05)
        fetcher.start()
        until(lambda: kids(door) == ["b"])
        fetcher.stop()
        fetcher._thread.join(10)
        asked = len(site.received)
        due(door)
        assert not fetcher._thread.is_alive()
        assert len(site.received) == asked
