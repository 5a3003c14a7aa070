"""Posting with the signature of Standard Webhooks."""

from __future__ import annotations

import base64

import pytest

from receiver.errors import ConfigurationError
from receiver.outbound import UnusableAnswer
from receiver.outbound.standard_webhooks import post, secret_key, signature
from tests.support.scripted_endpoint import ScriptedEndpoint, answer

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_example_of_the_specification() -> None:
    """The vector that the libraries of Standard Webhooks test themselves with."""
    made = signature(secret_key(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_post() -> None:
    """The body arrives unchanged, with its id, its time and its signature."""
    with ScriptedEndpoint(answer(204, b"")) as endpoint:
        post(f"{endpoint.url}/hook?x=1", SECRET, "msg_1", 1614265330, b'{"a": 1}')
        (request,) = endpoint.received
    assert (request.method, request.target, request.body) == ("POST", "/hook?x=1", b'{"a": 1}')
    assert request.headers["webhook-id"] == "msg_1"
    assert request.headers["webhook-timestamp"] == "1614265330"
    assert request.headers["webhook-signature"] == signature(secret_key(SECRET), "msg_1", 1614265330, b'{"a": 1}')


@pytest.mark.parametrize("status", [301, 302, 400, 410, 500])
def test_a_refused_post(status: int) -> None:
    """Any other status is an error, and a redirect is not followed."""
    with ScriptedEndpoint(answer(status, b"no")) as endpoint:
        with pytest.raises(UnusableAnswer, match=str(status)):
            post(endpoint.url, SECRET, "msg_1", 1, b"{}")
        assert len(endpoint.received) == 1


def test_plain_http() -> None:
    """Only to a loopback address."""
    with pytest.raises(ConfigurationError, match="https://"):
        post("http://ops.example/hook", SECRET, "msg_1", 1, b"{}")


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_CANARY!", f"whsec_{base64.b64encode(b'x' * 23).decode()}", "CANARY" * 30]
)
def test_a_secret_that_is_not_valid(secret: str) -> None:
    """It is refused without being quoted."""
    with pytest.raises(ConfigurationError) as caught:
        secret_key(secret)
    assert "CANARY" not in str(caught.value)
