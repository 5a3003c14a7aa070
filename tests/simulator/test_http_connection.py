"""The HTTP connection of the simulator: keep-alive, lost responses, limits and TLS."""

from __future__ import annotations

import ssl
from threading import Event

import pytest
import trustme

from receiver.errors import ConfigurationError
from receiver.simulator.http_connection import HttpConnection, HttpReply
from tests.support.scripted_endpoint import ScriptedEndpoint, answer, hang_up, late, then_close


def post(line: HttpConnection, *, lose_answer: bool = False) -> HttpReply:
    return line.request("POST", "/redox/main", body=b"{}", headers={"x": "y"}, lose_answer=lose_answer)


def test_one_connection_serves_many_requests() -> None:
    """With keep-alive, a second request opens no connection."""
    with ScriptedEndpoint() as endpoint, HttpConnection(endpoint.url, timeout=10) as line:
        assert [post(line).status, post(line).status] == [200, 200]
        assert endpoint.connections == 1


def test_a_reply() -> None:
    """A reply has status, body, headers and times."""
    with (
        ScriptedEndpoint(answer(418, b'{"a": 1}', "application/json")) as endpoint,
        HttpConnection(endpoint.url, timeout=10) as line,
    ):
        got = post(line)
    assert (got.status, got.body, got.json(), got.error) == (418, b'{"a": 1}', {"a": 1}, None)
    assert got.headers["content-type"] == "application/json"
    assert not got.accepted
    assert got.seconds >= 0


def test_a_closed_connection() -> None:
    """A connection that is closed without a response gives a reason. The next request opens a new one."""
    with ScriptedEndpoint(hang_up) as endpoint, HttpConnection(endpoint.url, timeout=10) as line:
        got = post(line)
        assert (got.status, got.error, got.accepted) == (None, "RemoteDisconnected", False)
        assert post(line).status == 200
        assert endpoint.connections == 2


def test_a_large_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes above the limit are not read, and are not taken as the next response."""
    monkeypatch.setattr("receiver.simulator.http_connection._ANSWER_LIMIT", 10)
    with ScriptedEndpoint(answer(200, b"x" * 100)) as endpoint, HttpConnection(endpoint.url, timeout=10) as line:
        assert post(line).body == b"x" * 10
        assert post(line).body == b""


def test_connection_refused() -> None:
    """A refused connection gives no status, but a reason."""
    with ScriptedEndpoint() as endpoint:
        url = endpoint.url
    with HttpConnection(url, timeout=10) as line:
        assert post(line).error == "ConnectionRefusedError"


def test_a_late_response() -> None:
    """A response after the timeout is not taken as the next response."""
    arrived = Event()
    with ScriptedEndpoint(late(arrived), answer(204)) as endpoint, HttpConnection(endpoint.url, timeout=0.2) as line:
        assert post(line).error == "TimeoutError"
        arrived.set()
        assert post(line).status == 204


def test_a_lost_response() -> None:
    """The server has received the whole request and has answered; the sender does not see the response."""
    with ScriptedEndpoint(answer(200)) as endpoint, HttpConnection(endpoint.url, timeout=10) as line:
        got = post(line, lose_answer=True)
        assert (got.status, got.error) == (None, "AnswerLost")
        assert endpoint.received[0].body == b"{}"
        assert post(line).status == 200
        assert endpoint.connections == 2


def test_a_connection_that_died_idle_is_not_used() -> None:
    """A connection that the server closed while it was idle is not used for the next request."""
    with ScriptedEndpoint(then_close(answer(200))) as endpoint, HttpConnection(endpoint.url, timeout=10) as line:
        post(line)
        # The server's FIN follows its answer: wait for it as the line would see it.
        sock = line._connection.sock
        assert sock is not None
        sock.settimeout(10)
        assert sock.recv(1, 2) == b""  # MSG_PEEK
        assert post(line).status == 200


def test_tls_with_a_context_of_ones_own() -> None:
    """With an SSL context a private certificate authority can be trusted. Without it nothing is sent."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with ScriptedEndpoint() as endpoint:
        endpoint.wrap(server)
        url = endpoint.url.replace("http://127.0.0.1", "https://localhost")
        with HttpConnection(url, timeout=10, tls=trusting) as trusted, HttpConnection(url, timeout=10) as wary:
            assert post(trusted).status == 200
            assert post(wary).error == "SSLCertVerificationError"
        assert len(endpoint.received) == 1


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://example.com", "http://"])
def test_an_invalid_base_url(url: str) -> None:
    """An invalid base URL is refused at once, with a text that says what is valid."""
    with pytest.raises(ConfigurationError, match="base URL must be http"):
        HttpConnection(url, timeout=1)
