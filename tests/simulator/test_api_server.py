"""The HTTP server of the fake Redox API."""

from __future__ import annotations

import socket
import ssl
import threading

import httpx2
import pytest
import trustme

from receiver.fault_injection.api_faults import ApiFault
from receiver.simulator.api import FakeRedoxApi
from tests.simulator.api_requests import bearer


def test_unknown_paths_and_large_bodies(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """An unknown path is answered 404. A body without a length, or over 40 MB, is not read."""
    headers = bearer(http, api)

    assert http.get("/nothing", headers=headers).status_code == 404
    assert http.post("/endpoint", content=iter([b"x"]), headers=headers).status_code == 411
    with pytest.raises(httpx2.HTTPError):
        http.post("/endpoint", content=bytes(40 * 1024 * 1024 + 1), headers=headers).raise_for_status()


def test_requests_are_recorded(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Requests are kept in order with their headers and bodies, and neither is in a repr."""
    http.post("/endpoint?x=1", content=b"canary", headers={"X-Canary": "canary"})
    (received,) = api.received("/endpoint")

    assert (received.method, received.path, received.body) == ("POST", "/endpoint?x=1", b"canary")
    assert received.headers["x-canary"] == "canary"
    assert "canary" not in repr(received)


def test_tls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With a context the server uses TLS. A client that rejects its certificate does not stop it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with FakeRedoxApi(ssl_context=context, host="localhost") as api:
        assert api.base_url.startswith("https://localhost:")
        with pytest.raises(httpx2.ConnectError), httpx2.Client(trust_env=False) as http:
            http.get(api.base_url)
        with httpx2.Client(verify=trusting, trust_env=False) as http:
            assert http.get(api.base_url).status_code == 401


def test_incomplete_request(api: FakeRedoxApi) -> None:
    """A body that ends before its length is not recorded as a request."""
    with socket.create_connection(("127.0.0.1", int(api.base_url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"POST /endpoint HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert api.requests == []


def test_stop_closes_connections() -> None:
    """At the end every connection is closed and every thread ends, even while a response is withheld."""
    before = threading.active_count()
    with httpx2.Client(trust_env=False) as http:
        with FakeRedoxApi() as api:
            api.fail("/", ApiFault.SILENCE)
            with pytest.raises(httpx2.ReadTimeout):
                http.get(api.base_url, timeout=0.1)
            http.get(api.base_url)
        assert threading.active_count() == before
