"""Key sets are fetched again on a timer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from receiver import keyring as keyrings
from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.outbound.jwks import fetch
from receiver.storage.registry.follower import RegistryFollower
from receiver.storage.registry.jwks_refresher import JwksRefresher, failing_keys
from receiver.storage.registry.loader import load_registry, stale_credentials
from tests.protocol.verification.issuers import RSA_FIRST, RSA_SECOND, PrivateKey, jwk
from tests.storage.door import DESTINATION, Door
from tests.support.scripted_endpoint import ScriptedEndpoint, answer


def document(**keys: PrivateKey) -> bytes:
    return json.dumps({"keys": [jwk(key, kid=kid) for kid, key in keys.items()]}).encode()


def add(door: Door, url: str, **settings: Any) -> int:
    return door.registration.add_credential(
        DESTINATION,
        door.now,
        "jwt",
        {"issuers": ["i"], "audiences": ["a"], "jwks_url": url, **settings},
        None,
        label=None,
        expires_at=None,
        fetched=document(a=RSA_FIRST),
    )


def due(door: Door) -> None:
    door.rows("UPDATE key_sets SET tried_at = now() - interval '1 hour'")


def kids(door: Door) -> list[str | None]:
    return [key.kid for each in door.destination.credentials if hasattr(each, "rules") for key in each.rules.keys]


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not become so in time"
        time.sleep(0.02)


def test_a_due_key_set_is_fetched(door: Door, engine: Engine, keyring: Keyring) -> None:
    """New keys at the URL are stored; a key set that was fetched recently is not fetched."""
    with ScriptedEndpoint(answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys?for=us")
        fetcher = JwksRefresher(engine, keyring, fetch, every=300)
        assert not fetcher.renew_one()
        due(door)
        assert fetcher.renew_one()
        assert not fetcher.renew_one()
        (request,) = site.received
    assert kids(door) == ["b"]
    assert request.target == "/keys?for=us"
    assert request.headers["accept-encoding"] == "identity"


def test_the_database_s_clock_decides_when_it_is_due(door: Door, engine: Engine, keyring: Keyring) -> None:
    """A host whose clock is an hour ahead does not delay the next fetch by an hour."""
    door.registration.add_credential(
        DESTINATION,
        door.now + timedelta(hours=1),
        "jwt",
        {"issuers": ["i"], "audiences": ["a"], "jwks_url": "https://keys.example/"},
        None,
        label=None,
        expires_at=None,
        fetched=document(a=RSA_FIRST),
    )
    assert door.value("SELECT tried_at <= now() FROM key_sets")


def test_a_failure_keeps_the_keys(door: Door, engine: Engine, keyring: Keyring) -> None:
    """After an error, an invalid document, a redirect, a large document or no connection, the keys stay and the failure
    is stored.
    """
    with ScriptedEndpoint(
        answer(500), answer(200, b"<html>"), answer(302), answer(200, b" " * 300_000), answer(404)
    ) as site:
        add(door, f"{site.url}/keys")
        fetcher = JwksRefresher(engine, keyring, fetch, every=300)
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


def test_stale_keys_are_not_trusted(door: Door, engine: Engine, keyring: Keyring) -> None:
    """After --max-stale without a successful fetch the credential is stale, until a fetch succeeds."""
    with ScriptedEndpoint(answer(200, document(a=RSA_FIRST))) as site:
        add(door, f"{site.url}/keys", max_stale=3600)
        assert not stale(door)
        with engine.connect() as connection:
            assert 0 < load_registry(connection, keyring).reload_after <= 3600
            assert failing_keys(connection) == []
        door.rows("UPDATE key_sets SET fetched_at = now() - interval '61 minutes', failure = 'nobody there'")
        assert stale(door)
        with engine.connect() as connection:
            assert load_registry(connection, keyring).reload_after <= 5
            [found] = failing_keys(connection)
        assert (found.destination, found.kind, found.failure, found.stale) == (DESTINATION, "jwt", "nobody there", True)
        due(door)
        assert JwksRefresher(engine, keyring, fetch, every=300).renew_one()
        assert not stale(door)


def test_a_follower_learns_that_keys_are_stale_without_a_new_version(
    door: Door, keyring_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It loads the registry again when the first keys become stale, and while they are; the log has one line."""
    add(door, "https://keys.example/", max_stale=60)
    door.rows("UPDATE key_sets SET fetched_at = now() - interval '58 seconds'")
    follower = RegistryFollower(door.engine, keyrings.load_keyring(keyring_path))
    follower.start()
    assert follower.current is not None
    assert stale_credentials(follower.current) == frozenset()
    until(lambda: follower.current and stale_credentials(follower.current))
    door.rows("UPDATE key_sets SET fetched_at = now()")
    until(lambda: follower.current and not stale_credentials(follower.current))
    follower.stop()
    assert capsys.readouterr().out.count("key_set.stale") == 1


def test_the_default_is_72_hours(door: Door) -> None:
    """The keys of a file do not become stale."""
    add(door, "https://keys.example/")
    for hours, expected in ((71, False), (73, True)):
        door.rows(f"UPDATE key_sets SET fetched_at = now() - interval '{hours} hours'")
        assert stale(door) is expected
    with pytest.raises(ConfigurationError, match="--max-stale"):
        door.registration.add_credential(
            DESTINATION,
            door.now,
            "jwt",
            {"issuers": ["i"], "audiences": ["a"], "max_stale": 60, "keys": document(a=RSA_FIRST).decode()},
            None,
            label=None,
            expires_at=None,
        )


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE key_sets SET url = :url",
        "UPDATE key_sets SET mac_key = 'mac-0'",
        "UPDATE credentials SET settings = jsonb_set(settings, '{leeway}', '1')",
    ],
)
def test_a_changed_row_is_not_fetched(door: Door, engine: Engine, keyring: Keyring, edit: str) -> None:
    """Write access to the database must not be enough to make this host send a request."""
    with ScriptedEndpoint() as site:
        add(door, f"{site.url}/keys")
        door.rows(
            "UPDATE credentials SET settings = jsonb_set(settings, '{jwks_url}', to_jsonb(CAST(:url AS text)))"
            if ":url" in edit
            else "SELECT 1",
            **({"url": f"{site.url}/other"} if ":url" in edit else {}),
        )
        door.rows(edit, **({"url": f"{site.url}/other"} if ":url" in edit else {}))
        due(door)
        assert JwksRefresher(engine, keyring, fetch, every=300).renew_one()
        assert site.received == []


def stale(door: Door) -> bool:
    with door.engine.connect() as connection:
        return bool(stale_credentials(load_registry(connection, door.keyring)))


def test_a_success_clears_the_failure(door: Door, engine: Engine, keyring: Keyring) -> None:
    """A successful fetch removes the failure."""
    with ScriptedEndpoint(answer(500), answer(200, document(a=RSA_FIRST))) as site:
        add(door, f"{site.url}/keys")
        fetcher = JwksRefresher(engine, keyring, fetch, every=300)
        for expected in (True, False):
            due(door)
            assert fetcher.renew_one()
            assert (door.value("SELECT failure FROM key_sets") is not None) is expected


def test_unused_key_sets_are_not_fetched(door: Door, engine: Engine, keyring: Keyring) -> None:
    """After the last credential with a URL is revoked, the URL is not fetched."""
    with ScriptedEndpoint() as site:
        number = add(door, f"{site.url}/keys")
        door.registration.revoke_credential(number, door.now)
        due(door)
        assert not JwksRefresher(engine, keyring, fetch, every=300).renew_one()
        assert site.received == []


def test_one_of_many_processes_fetches(door: Door, engine: Engine, keyring: Keyring) -> None:
    """Concurrent processes fetch the URL once."""
    with ScriptedEndpoint(answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys")
        due(door)
        threads = [
            threading.Thread(target=JwksRefresher(engine, keyring, fetch, every=300).renew_one) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(site.received) == 1


def test_the_timer(door: Door, engine: Engine, keyring: Keyring) -> None:
    """After start it fetches on its own, continues after failures, and stops."""
    with ScriptedEndpoint(answer(500), answer(200, document(b=RSA_SECOND))) as site:
        add(door, f"{site.url}/keys")
        fetcher = JwksRefresher(engine, keyring, fetch, every=0.05)
        fetcher.start()
        until(lambda: kids(door) == ["b"])
        fetcher.stop()
        fetcher._thread.join(10)
        asked = len(site.received)
        due(door)
        assert not fetcher._thread.is_alive()
        assert len(site.received) == asked
