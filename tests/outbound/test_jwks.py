"""Fetching public keys: https or loopback, no redirects, bounded in size and time."""

from __future__ import annotations

import socket
import ssl
from contextlib import closing

import pytest

from receiver.errors import ConfigurationError
from receiver.outbound import OutboundError, RedoxUnavailable, Untrusted, UnusableAnswer
from receiver.outbound import jwks as module
from receiver.outbound.jwks import MAX_BYTES, fetch
from tests.outbound.conftest import serving
from tests.support.scripted_endpoint import ScriptedEndpoint, answer


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example/keys",
        "http://10.0.0.1/keys",
        "ftp://127.0.0.1/keys",
        "file:///etc/passwd",
        "keys",
        "",
        "https://user:pw@issuer.example/keys",
        "https://issuer.example/keys#x",
        "https://issuer.example:port/keys",
    ],
)
def test_refused_urls(url: str) -> None:
    """Plain http to another machine, a file, and a URL with a password are refused."""
    with pytest.raises(ConfigurationError, match="https://"):
        fetch(url)


def test_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are returned unchanged, the query is kept, and no proxy of the environment is used."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with ScriptedEndpoint(answer(200, b'{"keys": []}')) as endpoint:
        assert fetch(f"{endpoint.url}/a/b?c=d") == b'{"keys": []}'
        (request,) = endpoint.received
    assert (request.method, request.target) == ("GET", "/a/b?c=d")
    assert "authorization" not in request.headers


def test_over_tls(authority: object, trusting: ssl.SSLContext) -> None:
    """With a trusted certificate the keys are fetched; otherwise not."""
    with ScriptedEndpoint(answer(200, b"keys")) as endpoint:
        endpoint.wrap(serving(authority.issue_cert("127.0.0.1")))  # type: ignore[attr-defined] # trustme's
        url = endpoint.url.replace("http:", "https:")
        assert fetch(url, ssl_context=trusting) == b"keys"
        with pytest.raises(Untrusted):
            fetch(url)


@pytest.mark.parametrize(
    ("status", "body"), [(301, b""), (302, b""), (404, b""), (500, b""), (204, b""), (200, b"x" * (MAX_BYTES + 1))]
)
def test_unusable_responses(status: int, body: bytes) -> None:
    """A redirect is not followed, an error status is an error, and a large body is not read."""
    with ScriptedEndpoint(answer(status, body)) as endpoint, pytest.raises(UnusableAnswer):
        fetch(endpoint.url)
    assert len(endpoint.received) == 1


def test_connection_refused() -> None:
    """A refused connection is an error of ours."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RedoxUnavailable):
        fetch(url)


def test_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not respond ends in a timeout."""
    monkeypatch.setattr(module, "FETCH_TIMEOUT", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, pytest.raises(OutboundError):
        fetch(f"http://127.0.0.1:{listener.getsockname()[1]}")
