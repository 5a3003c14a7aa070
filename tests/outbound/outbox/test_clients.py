"""The clients of registered API keys."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from receiver.errors import NotFound
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec
from receiver.storage.registry.loader import load_registry
from receiver.storage.registry.signing_keys import SigningKeys
from tests.outbound.conftest import message
from tests.outbound.outbox.conftest import Desk


def test_a_key_keeps_its_client(desk: Desk) -> None:
    """A key has one client, with one token, until the key is replaced."""
    first = desk.clients.client("lab")
    first.send(message())
    assert desk.clients.client("lab") is first
    first.send(message())
    assert len(desk.api.received("/v2/auth/token")) == 1
    desk.add_key("lab", legacy=True, replace=True)
    second = desk.clients.client("lab")

    assert second is not first
    second.send(message())
    assert len(desk.api.received("/auth/authenticate")) == 1
    first.send(message())  # a call that another thread is in the midst of


def test_another_key_of_the_environment_asks_for_sources(desk: Desk) -> None:
    """Once there is a second OAuth key, the client of the first requires a source in each message."""
    assert not desk.clients.client("lab").profile.several_keys
    desk.add_key("more")

    assert desk.clients.client("lab").profile.several_keys


def test_an_unknown_key(desk: Desk) -> None:
    """The error for an unknown key names the command that lists keys."""
    with pytest.raises(NotFound, match="outbound key list"):
        desk.clients.client("unheard-of")


def test_a_signing_key_is_rotated_while_it_runs(desk: Desk) -> None:
    """A rotated signing key is used with the next token, and a retired key is no longer needed."""
    now = datetime.now(UTC)
    signing = SigningKeys(desk.engine, desk.keyring, actor="tester@test")
    first = signing.new(now, "ES384")["kid"]
    ApiKeys(desk.engine, desk.keyring, actor="tester@test").add_api_key(
        "ours",
        ApiEndpoint(environment="production", base_url=desk.api.base_url, source_id=None),
        OAuthKeySpec(client_id="client-2"),
        now,
    )

    def published() -> dict[str, object]:
        with desk.engine.connect() as connection:
            return {"keys": [dict(key) for key in load_registry(connection, desk.keyring).public_keys]}

    desk.api.register_oauth("client-2", published)
    client = desk.clients.client("ours")
    client.send(message(Source={"ID": "s"}))
    signing.rotate(now, "RS384")
    client.send(message(Source={"ID": "s"}))  # with the token that it has
    signing.retire(first, now)
    desk.api.refuse_tokens()
    client.send(message(Source={"ID": "s"}))

    assert len(desk.api.processed) == 3
    assert len(desk.api.received("/v2/auth/token")) == 2
    assert desk.clients.client("ours") is client
