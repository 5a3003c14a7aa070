"""What a row of the registry means."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from receiver.protocol.registry import Credential, Environment, TestPolicy, default_test_policy, live
from tests.protocol.made_up import NOW, signing, token

_TICK = timedelta(microseconds=1)


@pytest.mark.parametrize("make", [token, signing])
def test_live(make: Callable[..., Credential]) -> None:
    """A credential opens until the moment it expires, and not at all once revoked, whatever its time."""
    assert live(make(), NOW)
    assert live(make(expires_at=NOW + _TICK), NOW)
    assert not live(make(expires_at=NOW), NOW)
    assert not live(make(expires_at=NOW - _TICK), NOW)
    assert not live(make(revoked=True), NOW)
    assert not live(make(revoked=True, expires_at=NOW + _TICK), NOW)


@pytest.mark.parametrize(
    ("environment", "policy"), [("development", "accept"), ("staging", "quarantine"), ("production", "quarantine")]
)
def test_where_tests_belong(environment: Environment, policy: TestPolicy) -> None:
    """Development takes test messages; staging and production keep them back unless told."""
    assert default_test_policy(environment) == policy
