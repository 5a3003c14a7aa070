"""Requests to the fake Redox API with a bare httpx2 client: keys, assertions and tokens."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import httpx2
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from receiver.simulator.api import FakeRedoxApi

KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP384R1())
JWKS = {
    "keys": [
        {**jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "rsa"},
        {**jwt.algorithms.ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True), "kid": "ec"},
    ]
}
GRANT = {
    "grant_type": "client_credentials",
    "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
}
MESSAGE = {"Meta": {"DataModel": "PatientAdmin", "EventType": "Arrival", "Destinations": [{"ID": "d"}]}}


def claims(api: FakeRedoxApi, **changed: Any) -> dict[str, Any]:
    """Return valid claims, with changes; None removes a claim."""
    now = int(datetime.now(UTC).timestamp())
    whole = {
        "iss": "client",
        "sub": "client",
        "aud": f"{api.base_url}/v2/auth/token",
        "iat": now,
        "exp": now + 300,
        "jti": str(uuid.uuid4()),
        **changed,
    }
    return {name: value for name, value in whole.items() if value is not None}


def assertion(api: FakeRedoxApi, *, kid: str | None = "rsa", **changed: Any) -> str:
    """Return a signed assertion with these claims."""
    return jwt.encode(claims(api, **changed), KEY, algorithm="RS384", headers={"kid": kid} if kid else {})


def ask(http: httpx2.Client, signed: str) -> httpx2.Response:
    """Request a token with an assertion."""
    return http.post("/v2/auth/token", data={**GRANT, "client_assertion": signed})


def bearer(http: httpx2.Client, api: FakeRedoxApi) -> dict[str, str]:
    """Return headers with a new token."""
    return {"Authorization": f"Bearer {ask(http, assertion(api)).json()['access_token']}"}


def legacy(http: httpx2.Client) -> dict[str, Any]:
    """Authenticate with the legacy key. Returns the response."""
    reply: dict[str, Any] = http.post("/auth/authenticate", json={"apiKey": "key", "secret": "secret"}).json()
    return reply
