"""Values of the registry."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from receiver.protocol.registry import Credential, Environment, TestPolicy, default_test_policy, live
from tests.protocol.made_up import NOW, signing, token

_TICK = timedelta(microseconds=1)


@pytest.mark.parametrize("make", [token, signing])
def test_live(make: Callable[..., Credential]) -> None:
    """A credential is live until the moment it expires, and never once revoked."""
    assert live(make(), NOW)
    assert live(make(expires_at=NOW + _TICK), NOW)
    assert not live(make(expires_at=NOW), NOW)
    assert not live(make(expires_at=NOW - _TICK), NOW)
    assert not live(make(revoked=True), NOW)
    assert not live(make(revoked=True, expires_at=NOW + _TICK), NOW)


@pytest.mark.parametrize(
    ("environment", "policy"), [("development", "accept"), ("staging", "quarantine"), ("production", "quarantine")]
)
def test_the_default_test_policy(environment: Environment, policy: TestPolicy) -> None:
    """Development accepts test messages; staging and production quarantine them."""
    assert default_test_policy(environment) == policy
