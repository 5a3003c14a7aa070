"""Faults of the fake Redox API, over real sockets."""

from __future__ import annotations

import socket

import httpx2
import pytest

from receiver.fault_injection.api_faults import ApiFault
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import SimulatedApiAnswer
from tests.simulator.api_requests import MESSAGE, bearer


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (ApiFault.SERVER_ERROR, 500),
        (ApiFault.BAD_GATEWAY, 502),
        (ApiFault.UNAVAILABLE, 503),
        (ApiFault.GATEWAY_TIMEOUT, 504),
        (ApiFault.RATE_LIMITED, 429),
        (ApiFault.UNAUTHORIZED, 401),
        (ApiFault.REDIRECT, 307),
    ],
)
def test_status_faults(api: FakeRedoxApi, http: httpx2.Client, fault: ApiFault, status: int) -> None:
    """A fault is injected as often as requested, only at its path, and the request is not processed."""
    headers = bearer(http, api)
    api.fail("/endpoint", fault, times=2)

    assert http.get("/elsewhere", headers=headers).status_code == 404
    for _ in range(2):
        response = http.post("/endpoint", json=MESSAGE, headers=headers)
        assert response.status_code == status
        assert ("x-ratelimit-limit" in response.headers) == (fault is ApiFault.RATE_LIMITED)
        assert "retry-after" not in response.headers
        assert response.headers.get("location") == (api.redirect_to if fault is ApiFault.REDIRECT else None)
    assert api.processed == []
    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 200


def test_response_faults(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Garbage, 10 MB, a gzip bomb of 100 MB, or any given response."""
    api.fail("/", ApiFault.GARBAGE)
    api.fail("/", ApiFault.HUGE)
    api.fail("/", ApiFault.GZIP_BOMB)
    api.fail("/", SimulatedApiAnswer(status=418, body={"a": 1}, headers={"X-B": "c"}))

    assert http.get("/").text.startswith("<html>")
    assert len(http.get("/").content) == 10 * 1024 * 1024
    with http.stream("GET", "/") as bomb:
        assert bomb.headers["content-encoding"] == "gzip"
        assert sum(len(chunk) for chunk in bomb.iter_bytes()) == 100 * 1024 * 1024
    any_answer = http.get("/")
    assert (any_answer.status_code, any_answer.json(), any_answer.headers["x-b"]) == (418, {"a": 1}, "c")


@pytest.mark.parametrize(
    ("fault", "error", "processed"),
    [
        (ApiFault.NOT_HTTP, httpx2.RemoteProtocolError, 0),
        (ApiFault.DROP_BEFORE, httpx2.RemoteProtocolError, 0),
        (ApiFault.DROP_AFTER, httpx2.RemoteProtocolError, 1),
        (ApiFault.CUT_SHORT, httpx2.RemoteProtocolError, 1),
        (ApiFault.SILENCE, httpx2.ReadTimeout, 0),
    ],
)
def test_connection_faults(
    api: FakeRedoxApi, http: httpx2.Client, fault: ApiFault, error: type[Exception], processed: int
) -> None:
    """The response is lost before or after the message is processed."""
    headers = bearer(http, api)
    api.fail("/endpoint", fault)

    with pytest.raises(error):
        http.post("/endpoint", json=MESSAGE, headers=headers, timeout=0.5 if fault is ApiFault.SILENCE else 30)
    assert len(api.processed) == processed


def test_drip(api: FakeRedoxApi) -> None:
    """A drip continues without end, so a timeout for single reads does not end it."""
    api.fail("/", ApiFault.DRIP)
    with socket.create_connection(("127.0.0.1", int(api.base_url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = b""
        while heard.count(b"x") < 5:
            heard += connection.recv(100)
    assert heard.startswith(b"HTTP/1.1 200 OK\r\nX-Slow: ")
