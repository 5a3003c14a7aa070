"""What the tests of speaking to Redox share: a key, the fake API with and without TLS, and clients that are closed."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa

from receiver.outbound import LegacyKey, Limits, OAuthKey, RedoxClient
from receiver.simulator.api import FakeRedoxApi

PRIVATE = rsa.generate_private_key(65537, 2048)
KEY = OAuthKey(client_id="client-1", kid="kid-1", private_key=PRIVATE)
LEGACY = LegacyKey(api_key="canary-api-key", secret="canary-secret")
# Impatient, so that a test of patience does not take any.
QUICK = Limits(pause=0.001)

Connect = Callable[..., RedoxClient]


def jwks_of(*keys: OAuthKey) -> dict[str, Any]:
    """The public halves as Redox would find them."""
    return {
        "keys": [
            {**jwt.algorithms.RSAAlgorithm.to_jwk(key.private_key.public_key(), as_dict=True), "kid": key.kid}
            for key in keys
            if isinstance(key.private_key, rsa.RSAPrivateKey)
        ]
    }


def message(event: str = "Arrival", model: str = "PatientAdmin", **meta: Any) -> dict[str, Any]:
    """A small message of a synthetic patient."""
    return {
        "Meta": {"DataModel": model, "EventType": event, "Destinations": [{"ID": "destination-1"}], **meta},
        "Patient": {"Demographics": {"FirstName": "Canary", "LastName": "Größe"}},
    }


def query(**meta: Any) -> dict[str, Any]:
    """A small query."""
    return message("Query", "PatientSearch", **meta)


def know(api: FakeRedoxApi) -> FakeRedoxApi:
    """The fake, knowing both keys."""
    api.register_oauth(KEY.client_id, jwks_of(KEY))
    api.register_legacy(LEGACY.api_key, LEGACY.secret)
    return api


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come, and fail when it has not in half a minute."""
    tick = threading.Event()
    for _ in range(3_000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come about")


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    """The fake API over plain HTTP."""
    with FakeRedoxApi() as running:
        yield know(running)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority that nobody else knows."""
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client's context that trusts it."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """A server's context with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture
def tls_api(authority: trustme.CA) -> Iterator[FakeRedoxApi]:
    """The fake API over TLS, with a certificate for its address."""
    with FakeRedoxApi(ssl_context=serving(authority.issue_cert("127.0.0.1"))) as running:
        yield know(running)


@pytest.fixture
def connect(api: FakeRedoxApi) -> Iterator[Connect]:
    """Makes clients of the fake API, and closes them in the end."""
    with ExitStack() as stack:

        def make(key: Any = KEY, **options: Any) -> RedoxClient:
            return stack.enter_context(RedoxClient(key, **{"base_url": api.base_url, "limits": QUICK, **options}))

        yield make
