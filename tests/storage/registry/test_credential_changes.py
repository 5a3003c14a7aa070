"""Changes to credentials."""

from __future__ import annotations

import pytest

from receiver.errors import ConfigurationError, Conflict
from receiver.protocol.registry import live
from receiver.storage.registry.credentials import new_token
from tests.storage.door import DESTINATION, TOKEN, Door, body


def test_adding_a_credential_does_not_change_the_requirement(door: Door) -> None:
    """The requirement is stored, not derived from live credentials."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"s" * 32)
    assert door.destination.require == (frozenset({"token"}),)


def test_an_invalid_signing_secret_is_refused(door: Door) -> None:
    """A short secret and an unknown setting are refused."""
    for secret, settings in ((b"short", {}), (b"s" * 32, {"hedaer": "x"})):
        with pytest.raises(ConfigurationError):
            door.registration.add_credential(DESTINATION, door.now, "hmac", settings, secret)
    assert door.value("SELECT count(*) FROM credentials") == 1


def test_a_credential_is_revoked_permanently(door: Door) -> None:
    """A second revocation is a Conflict; the row stays for the audit."""
    number = door.value("SELECT id FROM credentials")
    door.registration.revoke_credential(number, door.now)
    assert not live(door.destination.credentials[0], door.now)
    with pytest.raises(Conflict, match="revoked already"):
        door.registration.revoke_credential(number, door.now)


def test_two_tokens_are_live_while_rotating(door: Door) -> None:
    """Both are accepted until the old one is revoked."""
    token = new_token()
    door.registration.add_credential(DESTINATION, door.now, "token", {}, token.encode())
    assert door.admit(body()).verified.credentials != door.admit(body(), token=token).verified.credentials
    door.registration.revoke_credential(door.admit(body(), token=TOKEN).verified.credentials[0], door.now)
    assert door.refuse(body(), token=TOKEN).status == 401
    door.admit(body(), token=token)
