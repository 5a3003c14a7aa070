"""Access tokens of Redox: assertions, token requests and replies, without a clock or a socket."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from hypothesis import given
from hypothesis import strategies as st

from receiver.protocol.api_keys import ApiKey, LegacyKey, OAuthKey
from receiver.protocol.api_tokens import AccessToken, Denial, build_assertion, read_token_reply, token_requests

BASE = "https://api.redoxengine.com"
TOKEN_URL = f"{BASE}/v2/auth/token"
NOW = datetime(2026, 3, 1, 12, 0, 0, 700_000, tzinfo=UTC)
RSA = rsa.generate_private_key(65537, 2048)
P384 = ec.generate_private_key(ec.SECP384R1())
OAUTH = OAuthKey(client_id="client-1", kid="kid-1", private_key=RSA)
LEGACY = LegacyKey(api_key="canary-api-key", secret="canary-secret")


def segments(assertion: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Return header, claims, signed bytes and signature, decoded with only base64 and json."""
    parts = assertion.split(".")
    header, claims, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts)
    return json.loads(header), json.loads(claims), assertion.rpartition(".")[0].encode(), signature


def test_another_library_verifies_an_rs384_assertion() -> None:
    """An RSA key's assertion has Redox's claims, and its signature is RSASSA-PKCS1-v1_5 with SHA-384."""
    header, claims, signed, signature = segments(build_assertion(OAUTH, TOKEN_URL, now=NOW, jti="jti-1"))

    RSA.public_key().verify(signature, signed, padding.PKCS1v15(), SHA384())
    assert header == {"alg": "RS384", "kid": "kid-1", "typ": "JWT"}
    issued = int(NOW.timestamp())
    assert claims == {
        "iss": "client-1",
        "sub": "client-1",
        "aud": TOKEN_URL,
        "iat": issued,
        "exp": issued + 300,
        "jti": "jti-1",
    }


def test_another_library_verifies_an_es384_assertion() -> None:
    """A P-384 key signs ES384: r and s, of 48 bytes each."""
    key = OAuthKey(client_id="client-1", kid="kid-1", private_key=P384)
    header, _, signed, signature = segments(build_assertion(key, TOKEN_URL, now=NOW, jti="jti-1"))

    assert header["alg"] == "ES384"
    assert len(signature) == 96
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    P384.public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(SHA384()))


def test_the_oauth_request_is_a_form_with_an_assertion() -> None:
    """One form-encoded request with Redox's three fields, and scope only if the key has one."""
    (request,) = token_requests(OAUTH, BASE, held=None, now=NOW, jti="jti-1")
    form = {name: values[0] for name, values in parse_qs(request.body.decode(), strict_parsing=True).items()}

    assert (request.url, request.media_type) == (TOKEN_URL, "application/x-www-form-urlencoded")
    assert form.keys() == {"grant_type", "client_assertion_type", "client_assertion"}
    assert form["grant_type"] == "client_credentials"
    assert form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    assert segments(form["client_assertion"])[1]["aud"] == TOKEN_URL

    scoped = OAuthKey(client_id="c", kid="k", private_key=RSA, scope="one two")
    (request,) = token_requests(scoped, BASE, held=None, now=NOW, jti="jti-2")
    assert parse_qs(request.body.decode())["scope"] == ["one two"]


def test_a_legacy_key_refreshes_before_it_authenticates() -> None:
    """A legacy key authenticates. With a refresh token it refreshes first, then authenticates."""
    (first,) = token_requests(LEGACY, BASE, held=None, now=NOW, jti="-")
    held = AccessToken(value="t", obtained=0.0, lifetime=300.0, refresh_token="r")
    refresh, again = token_requests(LEGACY, BASE, held=held, now=NOW, jti="-")

    assert (first.url, json.loads(first.body)) == (
        f"{BASE}/auth/authenticate",
        {"apiKey": "canary-api-key", "secret": "canary-secret"},
    )
    assert (refresh.url, json.loads(refresh.body)) == (
        f"{BASE}/auth/refreshToken",
        {"apiKey": "canary-api-key", "refreshToken": "r"},
    )
    assert again == first


def reply(key: ApiKey, body: object, status: int = 200) -> AccessToken | Denial:
    return read_token_reply(key, status, json.dumps(body).encode(), sent=100.0, now=NOW)


def test_an_oauth_reply_gives_a_token() -> None:
    """The lifetime begins when the request was sent, so it is never overestimated."""
    token = reply(OAUTH, {"access_token": "abc", "token_type": "Bearer", "expires_in": 299, "scope": "x"})

    assert token == AccessToken(value="abc", obtained=100.0, lifetime=299.0)


@pytest.mark.parametrize("expires_in", [None, "soon", -1, 0, True, []])
def test_an_invalid_lifetime_is_the_documented_one(expires_in: object) -> None:
    """A missing or invalid lifetime means the five minutes that Redox documents."""
    token = reply(OAUTH, {"access_token": "abc", "expires_in": expires_in})

    assert token == AccessToken(value="abc", obtained=100.0, lifetime=300.0)


@pytest.mark.parametrize(
    ("expires", "lifetime"),
    [
        ((NOW + timedelta(minutes=5)).isoformat(), 300.0),
        ("2026-03-01T12:10:00.700Z", 600.0),
        ("2026-03-01T12:10:00.700", 600.0),
        ((NOW - timedelta(hours=1)).isoformat(), 0.0),
        ("2126-03-01T00:00:00Z", 86_400.0),
        ("nonsense", 300.0),
        (7, 300.0),
    ],
)
def test_a_legacy_token_is_valid_until_expires(expires: object, lifetime: float) -> None:
    """`expires` is UTC, and limited to a day; an invalid one means five minutes."""
    token = reply(LEGACY, {"accessToken": "abc", "expires": expires, "refreshToken": "again"})

    assert token == AccessToken(value="abc", obtained=100.0, lifetime=lifetime, refresh_token="again")


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        "text",
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": "two words"},
        {"access_token": "line\r\nInjected: header"},
        {"access_token": "é"},
        {"access_token": "a" * 20_000},
        {"access_token": "abc", "token_type": "mac"},
        {"accessToken": "abc"},
    ],
)
def test_a_reply_without_a_token_is_a_denial(body: object) -> None:
    """A reply of 200 without a bearer token that is valid in a header is a denial."""
    assert reply(OAUTH, body) == Denial(status=200)


def test_redox_words_are_kept() -> None:
    """The error and its description, which the operator needs, are kept."""
    words = "Public key not found, check client_id, kid and Redox dashboard settings"

    assert reply(OAUTH, {"error": "invalid_request", "error_description": words}, 400) == Denial(
        status=400, error="invalid_request", description=words
    )


@pytest.mark.parametrize("words", ["rejected eyJhbGciOiJSUzM4NCJ9.x.y", "token " + "a" * 81])
def test_words_that_may_quote_a_secret_are_withheld(words: str) -> None:
    """A description that quotes an assertion or a token is withheld."""
    denial = reply(OAUTH, {"error_description": words}, 400)

    assert denial == Denial(status=400, description="(withheld: it may quote a secret)")


def test_words_are_cleaned_for_a_log() -> None:
    """Control and non-ASCII characters are replaced, and the length is limited."""
    denial = reply(OAUTH, {"error": "a\x1b[31m\nb\u202e", "error_description": "no " * 200}, 400)

    assert isinstance(denial, Denial)
    assert denial.error == "a?[31m?b?"
    assert denial.description is not None
    assert len(denial.description) == 200


def test_a_legacy_denial_keeps_no_words() -> None:
    """The plain text of a legacy denial is dropped: it may contain anything."""
    assert read_token_reply(LEGACY, 401, b"canary-secret is wrong", sent=0.0, now=NOW) == Denial(status=401)


@given(
    st.sampled_from([OAUTH, LEGACY]),
    st.integers(100, 599),
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.dictionaries(
            st.sampled_from(
                [
                    "access_token",
                    "accessToken",
                    "expires_in",
                    "expires",
                    "refreshToken",
                    "error",
                    "error_description",
                    "token_type",
                ]
            ),
            inner,
        ),
    ).map(lambda value: json.dumps(value).encode()),
)
def test_any_reply_is_a_token_or_a_denial(key: ApiKey, status: int, body: bytes) -> None:
    """No reply raises an error, and every token is valid in a header and expires."""
    outcome = read_token_reply(key, status, body, sent=0.0, now=NOW)

    if isinstance(outcome, AccessToken):
        assert 200 <= status < 300
        assert outcome.value.isascii()
        assert outcome.value.isprintable()
        assert 0.0 <= outcome.lifetime <= 86_400.0


def test_a_nested_reply_is_a_denial() -> None:
    """A reply with more levels than any decoder supports is a denial."""
    assert read_token_reply(OAUTH, 200, b'{"a":' * 200_000, sent=0.0, now=NOW) == Denial(status=200)


def test_a_token_is_renewed_before_it_expires() -> None:
    """A token of five minutes is renewed 30 s before its end; one of 20 s after 10 s."""
    token = AccessToken(value="t", obtained=1000.0, lifetime=300.0)
    assert not token.needs_renewal(1269.9)
    assert token.needs_renewal(1270.0)
    assert not token.expired(1299.9)
    assert token.expired(1300.0)
    assert token.remaining(1290.0) == 10.0

    short = AccessToken(value="t", obtained=0.0, lifetime=20.0)
    assert not short.needs_renewal(9.9)
    assert short.needs_renewal(10.0)


def test_no_repr_shows_a_secret() -> None:
    """The repr of keys, tokens and requests shows no secret."""
    token = AccessToken(value="canary-token", obtained=0.0, lifetime=1.0, refresh_token="canary-refresh")
    shown = repr(
        [
            OAUTH,
            LEGACY,
            token,
            token_requests(LEGACY, BASE, held=token, now=NOW, jti="j"),
            token_requests(OAUTH, BASE, held=None, now=NOW, jti="j"),
        ]
    )

    assert "canary" not in shown
    assert "eyJ" not in shown
    assert "RSAPrivateKey" not in shown
