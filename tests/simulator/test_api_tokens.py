"""Tokens of the fake Redox API: it rejects what Redox rejects, with Redox's texts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from receiver.simulator.api import FakeRedoxApi
from tests.simulator.api_requests import EC_KEY, GRANT, JWKS, KEY, MESSAGE, ask, assertion, bearer, claims, legacy


def test_a_valid_assertion(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The reply has the documented members, and the scope of the request."""
    reply = ask(http, assertion(api)).json()
    assert reply.keys() == {"access_token", "token_type", "expires_in"}
    assert (reply["token_type"], reply["expires_in"]) == ("Bearer", 300)

    scoped = http.post("/v2/auth/token", data={**GRANT, "client_assertion": assertion(api), "scope": "x"})
    assert scoped.json()["scope"] == "x"


def test_es384(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """An assertion that is signed with a P-384 key is accepted."""
    assert ask(http, jwt.encode(claims(api), EC_KEY, algorithm="ES384", headers={"kid": "ec"})).status_code == 200


def test_documented_rejections(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Each mistake that Redox documents is answered with Redox's text."""
    whole = {**GRANT, "client_assertion": assertion(api)}
    denials = {
        "x-www-form-urlencoded content-type required": http.post("/v2/auth/token", json=whole),
        "Missing grant_type parameter": http.post("/v2/auth/token", data={**whole, "grant_type": ""}),
        "Missing client assertion": http.post("/v2/auth/token", data=GRANT),
        "JWT header kid property is required": ask(http, assertion(api, kid=None)),
        "Public key not found, check client_id, kid and Redox dashboard settings": ask(http, assertion(api, kid="no")),
    }
    for words, response in denials.items():
        body = response.json()
        assert response.status_code == 400
        assert (body["error"], body["error_description"]) == ("invalid_request", words)
        assert body["error_uri"].startswith("https://")
    other = http.post("/v2/auth/token", data={**whole, "grant_type": "password"}).json()
    assert other["error"] == "unsupported_grant_type"
    unknown = ask(http, assertion(api, iss="nobody", sub="nobody")).json()
    assert unknown["error_description"].startswith("Public key not found")


BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "aud of another": {"aud": "https://api.redoxengine.com/v2/auth/token"},
    "no aud": {"aud": None},
    "sub of another": {"sub": "other"},
    "no sub": {"sub": None},
    "no iat": {"iat": None},
    "no exp": {"exp": None},
    "no jti": {"jti": None},
    "iat no number": {"iat": "now"},
}


@pytest.mark.parametrize("which", BAD_CLAIMS)
def test_invalid_claims(api: FakeRedoxApi, http: httpx2.Client, which: str) -> None:
    """Every claim is required and checked."""
    response = ask(http, assertion(api, **BAD_CLAIMS[which]))
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")


@pytest.mark.parametrize(
    ("age", "life", "good"),
    [
        (0, 300, True),
        (290, 300, True),
        (305, 310, False),
        (400, 300, False),
        (-5, 300, True),
        (-60, 300, False),
        (0, 301, False),
        (0, -60, False),
        (200, 100, False),
    ],
)
def test_times_of_an_assertion(api: FakeRedoxApi, http: httpx2.Client, age: int, life: int, good: bool) -> None:
    """`iat` is in the last 5 minutes, with 10 s of skew; `exp` is at most 300 s later, and not in the past."""
    now = int(datetime.now(UTC).timestamp())
    response = ask(http, assertion(api, iat=now - age, exp=now - age + life))
    assert response.status_code == (200 if good else 401)


def test_an_assertion_is_accepted_once(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A `jti` that was used is rejected."""
    signed = assertion(api)
    assert ask(http, signed).status_code == 200
    assert ask(http, signed).json()["error_description"] == "jti was already used"


def test_forged_assertions(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Another key, another algorithm, no algorithm, or an invalid JWT: no token."""
    other = rsa.generate_private_key(65537, 2048)
    forged = [
        jwt.encode(claims(api), other, algorithm="RS384", headers={"kid": "rsa"}),
        jwt.encode(claims(api), KEY, algorithm="RS256", headers={"kid": "rsa"}),
        jwt.encode(claims(api), "k" * 48, algorithm="HS384", headers={"kid": "rsa"}),
        jwt.encode(claims(api), "", algorithm="none", headers={"kid": "rsa"}),
        "x.y.z",
    ]
    assert [ask(http, one).status_code for one in forged] == [401] * len(forged)


def test_keys_are_fetched_each_time(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A key that is no longer published is no longer accepted."""
    published = [JWKS]
    api.register_oauth("client", lambda: published[0])
    assert ask(http, assertion(api)).status_code == 200
    published[0] = {"keys": []}
    assert ask(http, assertion(api)).status_code == 400


def test_a_legacy_key(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The reply has the documented members, and a refresh token is accepted once."""
    first = legacy(http)
    assert first.keys() == {"accessToken", "expires", "refreshToken"}
    assert timedelta(minutes=4) < datetime.fromisoformat(first["expires"]) - datetime.now(UTC) <= timedelta(minutes=5)

    asked = {"apiKey": "key", "refreshToken": first["refreshToken"]}
    again = http.post("/auth/refreshToken", json=asked)
    assert again.json().keys() == first.keys()
    used = http.post("/auth/refreshToken", json=asked)
    assert (used.status_code, used.headers["content-type"]) == (401, "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    "body",
    [{}, [], {"apiKey": "key"}, {"apiKey": "key", "secret": "wrong"}, {"apiKey": "other", "secret": "secret"}],
    ids=str,
)
def test_a_wrong_legacy_key(http: httpx2.Client, body: object) -> None:
    """A wrong legacy key is answered 401 in plain text."""
    response = http.post("/auth/authenticate", json=body)
    assert response.status_code == 401
    assert response.headers["content-type"].startswith("text/plain")


def test_only_a_valid_token_is_accepted(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A missing, unknown, expired or rejected token is answered 401."""
    clock = [datetime.now(UTC)]
    api.now = lambda: clock[0]
    ended, live = bearer(http, api), None
    clock[0] += timedelta(seconds=300)
    assert http.post("/endpoint", json=MESSAGE, headers=ended).status_code == 401
    clock[0] -= timedelta(seconds=299)
    live = bearer(http, api)
    assert http.post("/endpoint", json=MESSAGE, headers=live).status_code == 200
    api.refuse_tokens()
    for headers in (live, {}, {"Authorization": "Bearer made-up"}, {"Authorization": "Basic made-up"}):
        assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 401
    assert len(api.processed) == 1


def test_a_legacy_token_is_for_the_data_model(http: httpx2.Client) -> None:
    """A legacy token is accepted for messages, and rejected for FHIR."""
    headers = {"Authorization": f"Bearer {legacy(http)['accessToken']}"}

    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 200
    assert http.get("/fhir/R4/slug/Staging/Patient/p", headers=headers).status_code == 403
