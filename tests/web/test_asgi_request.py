"""An ASGI request: its head, its body and its WSGI environment."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.errors import BadTransfer
from receiver.web.asgi_request import AsgiRequest
from tests.protocol import made_up
from tests.web.asgi_calls import GONE, MODES, TOKEN, endpoint, head_of, never, request, run, scope, served_by


@pytest.mark.parametrize(
    ("raw", "path", "query", "target"),
    [
        (b"/redox/lab", "/redox/lab", b"", "/redox/lab"),
        (b"//redox/%6cab", "//redox/lab", b"a=%20b&a", "//redox/%6cab"),
        (b"http://u@h:8/redox/lab", "http://u@h:8/redox/lab", b"x?y", "/redox/lab"),
        (None, "/redox/lab", b"", "/redox/lab"),
    ],
)
def test_target(raw: bytes | None, path: str, query: bytes, target: str) -> None:
    """Path and query are those on the wire, even if the server has decoded the path."""
    found = head_of(scope(path, raw_path=raw, query_string=query))
    assert (found.destination, found.target, found.query) == ("lab", target, query.decode())


def test_head() -> None:
    """Header values are those on the wire; a field sent twice has both values, with a comma. The peer is the same in
    both modes.
    """
    headers = [(b"x-a", b"\xe9"), (b"x-b", b"1"), (b"x-b", b"2"), (b"x-forwarded-for", b"192.0.2.1")]
    found = head_of(scope("/redox/lab", headers=headers, client=("10.0.0.1", 1)), proxies=["10.0.0.0/8"])
    assert found.header("x-a") == b"\xe9"
    assert found.header("x-b") == b"1,2"
    assert (found.peer, found.proxied) == ("192.0.2.1", True)
    found = head_of(scope("/redox/lab", headers=headers, client=("10.0.0.1", 1)))
    assert (found.peer, found.proxied) == ("10.0.0.1", False)
    found = head_of(scope("/redox/lab", client=None))
    assert (found.peer, found.proxied) == ("unknown", True)  # over a Unix socket


@pytest.mark.parametrize(
    ("headers", "length"), [([], 0), ([(b"content-length", b"4")], 4), ([(b"transfer-encoding", b"chunked")], None)]
)
def test_length(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    """A body has a length, or is chunked."""
    assert AsgiRequest(scope(headers=headers), never).length == length


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"-4")],
        [(b"content-length", b"\xb2")],
        [(b"content-length", b"4, 4")],
        [(b"content-length", b"4"), (b"content-length", b"4")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"gzip"), (b"transfer-encoding", b"chunked")],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_length(headers: list[tuple[bytes, bytes]], mode: str) -> None:
    """With any other framing, if a server lets it through, no body is read."""
    with pytest.raises(BadTransfer):
        _ = AsgiRequest(scope(headers=headers), never).length
    coded = headers[0][0] == b"transfer-encoding"
    answer = served_by(endpoint(), scope(headers=[*headers, TOKEN]), mode=mode)
    assert (answer[0], answer[1]["connection"]) == (501 if coded else 400, "close")


@pytest.mark.parametrize(("headers", "length"), [([], None), ([(b"content-length", b"4")], 4)])
def test_length_in_http_2(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    """In HTTP/2 a body need not be announced: if a server supports it, no body is missed."""
    transfer = AsgiRequest(scope(headers=headers, http_version="2"), never)
    assert transfer.length == length


def read(headers: list[tuple[bytes, bytes]], *messages: Any, size: int = 3) -> list[bytes]:
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0)

    async def work() -> list[bytes]:
        transfer = AsgiRequest(scope(headers=headers), receive)
        pieces = [await transfer.read(size, 5)]
        while pieces[-1]:
            pieces.append(await transfer.read(size, 5))
        return pieces

    found: list[bytes] = run(work)
    return found


def test_pieces() -> None:
    """However the server cuts a body, a read returns at most the requested size, and nothing is lost."""
    chunked = [(b"transfer-encoding", b"chunked")]
    assert read(
        chunked,
        {"type": "http.request", "body": b"abcdefgh", "more_body": True},
        {"type": "http.request", "more_body": True},
        request(b"i"),
    ) == [b"abc", b"def", b"gh", b"i", b""]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([(b"transfer-encoding", b"chunked")], GONE),
        ([(b"content-length", b"9")], {"type": "http.unheard-of", "body": b"123456789"}),
    ],
)
def test_malformed(headers: list[tuple[bytes, bytes]], message: Any) -> None:
    """A chunked body without its last chunk is malformed; so is an event that ASGI does not define."""
    with pytest.raises(BadTransfer, match="body_malformed"):
        read(headers, message)


def test_gone() -> None:
    """When a sender disconnects, the data that it has sent can still be read."""
    assert read([(b"content-length", b"9")], {"type": "http.request", "body": b"ab", "more_body": True}, GONE) == [
        b"ab",
        b"",
    ]


def test_too_slow() -> None:
    """A read without data raises BadTransfer after its seconds."""
    with pytest.raises(BadTransfer, match="body_too_slow"):
        run(lambda: AsgiRequest(scope(headers=[(b"content-length", b"9")]), never).read(9, 0.01))


def test_underscores() -> None:
    """A header field with an underscore is dropped: in a WSGI environment it would look like one with a hyphen."""
    asked = scope(body=made_up.BODY, headers=[(b"verification_token", TOKEN[1])])
    for mode in MODES:
        assert served_by(endpoint(), asked, request(made_up.BODY), mode=mode)[0] == 401
    assert "HTTP_VERIFICATION_TOKEN" not in AsgiRequest(asked, never).environ()
