"""Keys, the fake Redox API with and without TLS, and clients that are closed at the end."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa

from receiver.outbound import LegacyKey, Limits, OAuthKey, RedoxAuth, RedoxClient
from receiver.simulator.api import FakeRedoxApi

PRIVATE = rsa.generate_private_key(65537, 2048)
KEY = OAuthKey(client_id="client-1", kid="kid-1", private_key=PRIVATE)
LEGACY = LegacyKey(api_key="canary-api-key", secret="canary-secret")
# Short pauses, so that tests of retries are quick.
QUICK = Limits(pause=0.001)

Connect = Callable[..., RedoxClient]
MakeAuth = Callable[..., RedoxAuth]


def jwks_of(*keys: OAuthKey) -> dict[str, Any]:
    """Return the public keys as a JWKS."""
    return {
        "keys": [
            {**jwt.algorithms.RSAAlgorithm.to_jwk(key.private_key.public_key(), as_dict=True), "kid": key.kid}
            for key in keys
            if isinstance(key.private_key, rsa.RSAPrivateKey)
        ]
    }


def message(event: str = "Arrival", model: str = "PatientAdmin", **meta: Any) -> dict[str, Any]:
    """Return a small message of a synthetic patient."""
    return {
        "Meta": {"DataModel": model, "EventType": event, "Destinations": [{"ID": "destination-1"}], **meta},
        "Patient": {"Demographics": {"FirstName": "Canary", "LastName": "Größe"}},
    }


def token_requests(api: FakeRedoxApi) -> list[str]:
    """Return the paths of the token requests."""
    return [one.path for one in api.requests if one.path.startswith(("/v2/auth", "/auth"))]


def query(**meta: Any) -> dict[str, Any]:
    """Return a small query."""
    return message("Query", "PatientSearch", **meta)


def with_keys(api: FakeRedoxApi) -> FakeRedoxApi:
    """Register both keys with the API."""
    api.register_oauth(KEY.client_id, jwks_of(KEY))
    api.register_legacy(LEGACY.api_key, LEGACY.secret)
    return api


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    """The fake API over plain HTTP."""
    with FakeRedoxApi() as running:
        yield with_keys(running)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority for the tests."""
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client's context that trusts the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """Return a server's context with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture
def tls_api(authority: trustme.CA) -> Iterator[FakeRedoxApi]:
    """The fake API over TLS, with a certificate for its address."""
    with FakeRedoxApi(ssl_context=serving(authority.issue_cert("127.0.0.1"))) as running:
        yield with_keys(running)


@pytest.fixture
def connect(api: FakeRedoxApi) -> Iterator[Connect]:
    """A function that makes clients of the fake API, which are closed at the end."""
    with ExitStack() as stack:

        def make(key: Any = KEY, **options: Any) -> RedoxClient:
            return stack.enter_context(RedoxClient(key, **{"base_url": api.base_url, "limits": QUICK, **options}))

        yield make


@pytest.fixture
def make_auth(api: FakeRedoxApi) -> Iterator[MakeAuth]:
    """A function that makes RedoxAuth objects, which are closed at the end."""
    with ExitStack() as stack:

        def make(key: Any = KEY, **options: Any) -> RedoxAuth:
            auth = RedoxAuth(key, **{"base_url": api.base_url, **options})
            stack.callback(auth.close)
            return auth

        yield make
