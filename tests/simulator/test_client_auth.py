"""Credentials as Redox presents them: SigV4 as AWS's library signs, and OAuth tokens."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

import botocore.auth
import jwt
import pytest
import time_machine
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import ConfigurationError
from receiver.simulator.client_auth import (
    AccessTokenAuthenticator,
    OutgoingRequest,
    SignedTokenAuthenticator,
    SigV4Authenticator,
)
from tests.protocol.verification.issuers import P384
from tests.support.scripted_endpoint import ScriptedEndpoint, answer
from tests.web.test_authentication import private

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BODY = b'{"Meta":{}}'


def outgoing(target: str = "/redox/main", body: bytes = BODY) -> OutgoingRequest:
    return OutgoingRequest(
        method="POST", host="receiver.example", target=target, body=body, headers={"content-type": "application/json"}
    )


@given(
    st.sampled_from(["/redox/main", "/redox/a-b", "/x/redox/main?b=2&a=1", "/redox/main?a=%20&a=b"]),
    st.binary(max_size=40),
    st.sampled_from([None, "session"]),
)
def test_sigv4_as_botocore_signs(target: str, body: bytes, session: str | None) -> None:
    """The signature and all headers equal botocore's."""
    request = AWSRequest(
        method="POST", url=f"https://receiver.example{target}", data=body, headers={"Content-Type": "application/json"}
    )
    with time_machine.travel(NOW, tick=False):
        botocore.auth.SigV4Auth(Credentials("AKID", "secret", session), "s", "r").add_auth(request)
    presented = SigV4Authenticator(
        access_key="AKID", secret="secret", region="r", service="s", session_token=session
    ).headers(outgoing(target, body), now=NOW.timestamp())
    assert presented["authorization"] == request.headers["Authorization"]


def token(value: str, lifetime: object = 300) -> bytes:
    return json.dumps({"access_token": value, "token_type": "Bearer", "expires_in": lifetime}).encode()


@pytest.mark.parametrize("send", ["basic", "form", "json"])
def test_how_a_secret_is_sent(send: Any) -> None:
    """A client secret is sent in the header, or in the body as a form or JSON, with configurable names."""
    with ScriptedEndpoint(answer(200, token("t"))) as endpoint:
        presenter = AccessTokenAuthenticator(
            f"{endpoint.url}/oauth/main/token", "redox", secret="a+b c", send=send, names={"scope": "scopes"}, scope="s"
        )
        assert presenter.headers(outgoing(), now=0) == {"authorization": "Bearer t"}
        (request,) = endpoint.received
    form = (
        json.loads(request.body)
        if send == "json"
        else {name: value for name, (value,) in parse_qs(request.body.decode()).items()}
    )
    pair = {"client_id": "redox", "client_secret": "a+b c"}
    assert form == {"grant_type": "client_credentials", "scopes": "s"} | ({} if send == "basic" else pair)
    basic = f"Basic {b64encode(b'redox:a%2Bb+c').decode()}"
    assert request.headers.get("authorization") == (basic if send == "basic" else None)


def test_a_token_is_kept_until_it_ends() -> None:
    """A token is requested only when there is none that is valid for a while, not for each message."""
    with ScriptedEndpoint(
        answer(200, token("long")), answer(200, token("short", 0)), answer(200, token("next"))
    ) as endpoint:
        presenter = AccessTokenAuthenticator(f"{endpoint.url}/t", "redox", secret="s")
        assert [presenter.headers(outgoing(), now=0)["authorization"] for _ in range(3)] == ["Bearer long"] * 3
        fleeting = AccessTokenAuthenticator(f"{endpoint.url}/t", "redox", secret="s")
        assert [fleeting.headers(outgoing(), now=0)["authorization"] for _ in range(2)] == [
            "Bearer short",
            "Bearer next",
        ]
        assert len(endpoint.received) == 3


def test_no_token() -> None:
    """The error names a token endpoint that returns no token."""
    with (
        ScriptedEndpoint(answer(401, b'{"error": "invalid_client"}')) as endpoint,
        pytest.raises(ConfigurationError, match="401"),
    ):
        AccessTokenAuthenticator(f"{endpoint.url}/t", "redox", secret="s").headers(outgoing(), now=0)


def test_an_assertion() -> None:
    """iss and sub are the client, aud is the endpoint, and jti is new each time."""
    with ScriptedEndpoint(answer(200, token("a", 0)), answer(200, token("b", 0))) as endpoint:
        url = f"{endpoint.url}/oauth/main/token"
        assertion = SignedTokenAuthenticator(
            key=private(P384), algorithm="ES384", issuer="redox", subject="redox", audience=url
        )
        presenter = AccessTokenAuthenticator(url, "redox", assertion=assertion)
        for _ in range(2):
            presenter.headers(outgoing(), now=NOW.timestamp())
        sent = [parse_qs(request.body.decode())["client_assertion"][0] for request in endpoint.received]
    claims = [jwt.decode(each, options={"verify_signature": False}) for each in sent]
    assert {(each["iss"], each["sub"], each["aud"], each["exp"] - each["iat"]) for each in claims} == {
        ("redox", "redox", url, 300)
    }
    assert claims[0]["jti"] != claims[1]["jti"]
