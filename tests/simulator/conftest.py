"""A fake Redox API with an OAuth key and a legacy key, and a client for it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from receiver.simulator.api import FakeRedoxApi
from tests.simulator.api_requests import JWKS


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    """The API."""
    with FakeRedoxApi() as running:
        running.register_oauth("client", JWKS)
        running.register_legacy("key", "secret")
        yield running


@pytest.fixture
def http(api: FakeRedoxApi) -> Iterator[httpx2.Client]:
    """A client for the API."""
    with httpx2.Client(base_url=api.base_url, trust_env=False, timeout=30) as client:
        yield client
