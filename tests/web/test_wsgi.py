"""The Flask application: the head and body from a WSGI environment, and errors."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from receiver.errors import BadTransfer
from receiver.pipeline import Admitted, Challenged, Receipt, Refused
from receiver.protocol.message import Head, Nonce, ParsedMessage, Reply
from receiver.protocol.registry import Destination, Registry, Subscription
from receiver.web import runtime, wsgi
from receiver.web.body import Transfer
from receiver.web.endpoint import Endpoint
from receiver.web.handler_calls import Answered
from receiver.web.runtime import Runtime, ThreadRuntime, drive
from receiver.web.wsgi import WsgiTransfer
from tests.protocol import made_up


class Nobody:
    """A ledger and responders that must not be called."""

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        raise AssertionError

    def flush(self) -> None:
        """No request waits."""

    def refuse(self, refused: Refused) -> None:
        raise AssertionError

    def unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool) -> None:
        """Keep nothing of it."""

    def challenged(self, challenged: Challenged) -> None:
        raise AssertionError

    def answered(self, answered: Answered) -> Future[None]:
        raise AssertionError

    def first(self, once: Sequence[Nonce]) -> bool:
        raise AssertionError

    def answer(
        self, message: ParsedMessage, responder: Subscription, destination: Destination, receipt: Receipt
    ) -> bytes:
        raise AssertionError

    def run_inline(self, destination: Destination, receipt: Receipt) -> bool:
        raise AssertionError


class Silent(Nobody):
    """A ledger whose futures never complete."""

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        return Future()


class Listening(Endpoint):
    """An endpoint that remembers the heads of its requests."""

    def __init__(self) -> None:
        super().__init__(registry=lambda: None, ledger=Nobody(), responders=Nobody(), max_body=100, concurrency=1)
        self.heads: list[Head] = []

    async def serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        self.heads.append(head)
        return Reply(status=200)


def head_of(**environ: Any) -> Head:
    listening = Listening()
    app = wsgi.public_app(listening, trusted_proxies=["10.0.0.0/8"])
    app.test_client().post("/redox/lab", environ_overrides=environ)
    [head] = listening.heads
    return head


@pytest.mark.parametrize(
    ("raw", "target", "query"),
    [
        ("/redox/lab", "/redox/lab", ""),
        ("/redox/lab?", "/redox/lab", ""),
        ("//redox/%6cab?a=%20b&a", "//redox/%6cab", "a=%20b&a"),
        ("http://u@h:8/redox/lab?x?y", "/redox/lab", "x?y"),
        ("HTTPS://h?x", "", "x"),
        ("/redox/lab?u=http://h/", "/redox/lab", "u=http://h/"),
    ],
)
def test_target(raw: str, target: str, query: str) -> None:
    """Path and query are those on the wire, even if the server has decoded the path."""
    head = head_of(RAW_URI=raw)
    assert (head.target, head.query) == (target, query)


def test_target_of_a_server_that_does_not_give_it() -> None:
    """PEP 3333 has no raw target: then the path is encoded anew, and the query is the server's."""
    head = head_of(RAW_URI="", REQUEST_URI="", PATH_INFO="//redox/lab/", QUERY_STRING="challenge=%20b")
    assert (head.target, head.query) == ("/redox/lab", "challenge=%20b")


def test_a_wsgi_server_decides_about_the_connection() -> None:
    """No reply to a WSGI server has a Connection field, which PEP 3333 forbids: neither the endpoint's nor Flask's."""
    endpoint = Endpoint(registry=lambda: None, ledger=Nobody(), responders=Nobody(), max_body=100, concurrency=1)
    app = validator(wsgi.public_app(endpoint, trusted_proxies=[]))
    started: list[Any] = []

    def start(status: str, headers: list[tuple[str, str]], _exc_info: Any = None, /) -> Any:
        started[:] = [status, {name.lower() for name, _ in headers}]
        return bytes

    for path, status in (("/redox/lab", 503), ("/nowhere", 404)):
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "CONTENT_LENGTH": str(10**9),
            "HTTP_HOST": "receiver.test",
            "QUERY_STRING": "",
        }
        setup_testing_defaults(environ)
        result: Any = app(environ, start)
        assert b"".join(result)
        result.close()
        assert started[0].startswith(f"{status} ")
        assert "connection" not in started[1]


def test_head() -> None:
    """Header names are lower case, values are those on the wire, and the time is aware."""
    head = head_of(HTTP_X_A="\xe9", CONTENT_TYPE="text/x", REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="192.0.2.1")
    assert head.header("x-a") == b"\xe9"
    assert head.header("content-type") == b"text/x"
    assert (head.destination, head.method, head.peer, head.proxied) == ("lab", "POST", "192.0.2.1", True)
    assert head.received_at.tzinfo is UTC
    assert head_of(REMOTE_ADDR="192.0.2.2", HTTP_X_FORWARDED_FOR="192.0.2.1").proxied is False


@pytest.mark.parametrize(
    ("environ", "length", "read"),
    [
        ({}, 0, b"body"),
        ({"CONTENT_LENGTH": ""}, 0, b"body"),
        ({"CONTENT_LENGTH": "4"}, 4, b"body"),
        ({"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}, None, b"body"),
        ({"HTTP_TRANSFER_ENCODING": "chunked"}, None, None),
        ({"CONTENT_LENGTH": "-4"}, None, None),
        ({"CONTENT_LENGTH": "4", "HTTP_TRANSFER_ENCODING": "chunked"}, 4, b"body"),
        ({"CONTENT_LENGTH": "\xb2"}, None, None),
        ({"CONTENT_LENGTH": "4, 4", "wsgi.input_terminated": True}, None, None),
        ({"CONTENT_LENGTH": "9" * 20}, None, None),
    ],
)
def test_transfer(environ: dict[str, Any], length: int | None, read: bytes | None) -> None:
    """A body has a length, or chunks whose end the server marks; any other is not read."""
    transfer = WsgiTransfer({"wsgi.input": io.BytesIO(b"body"), **environ})
    if read is None:
        with pytest.raises(BadTransfer, match="body_malformed"):
            _ = transfer.length
    else:
        assert transfer.length == length
        assert drive(transfer.read(10, 1.0)) == read


def test_a_coroutine_that_needs_an_event_loop() -> None:
    """`drive` raises RuntimeError for a coroutine that awaits an event loop."""

    async def waits() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="event loop"):
        drive(waits())
    assert drive(ThreadRuntime().run_in_thread(lambda: 5)) == 5


def test_faults_are_not_the_messages() -> None:
    """An error in the endpoint or before it is a 503, which asks for the message again and quotes nothing."""

    def fails() -> Registry | None:
        raise ValueError("CANARY")

    endpoint = Endpoint(registry=fails, ledger=Nobody(), responders=Nobody(), max_body=100, concurrency=1)
    client = wsgi.public_app(endpoint, trusted_proxies=[]).test_client()
    answer = client.post("/redox/lab", data=b"{}")
    assert (answer.status_code, answer.data) == (503, b"try again later\n")

    class Failing(Listening):
        def __getattribute__(self, name: str) -> Any:
            if name == "serve":
                raise ValueError("CANARY")
            return super().__getattribute__(name)

    answer = wsgi.public_app(Failing(), trusted_proxies=[]).test_client().post("/redox/lab", data=b"{}")
    assert (answer.status_code, answer.data) == (503, b"try again later\n")


def test_a_silent_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the ledger never completes, the sender gets 503, not 200."""
    monkeypatch.setattr(runtime, "LEDGER_TIMEOUT", 0.05)
    registry = made_up.registry(made_up.destination(made_up.token()))
    endpoint = Endpoint(registry=lambda: registry, ledger=Silent(), responders=Nobody(), max_body=1000, concurrency=1)
    client = wsgi.public_app(endpoint, trusted_proxies=[]).test_client()
    answer = client.post("/redox/main", data=made_up.BODY, headers={"verification-token": made_up.TOKENS["first"]})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
