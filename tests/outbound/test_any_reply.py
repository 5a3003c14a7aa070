"""For any reply of a server, at either endpoint, the client returns a value or raises one of its named errors."""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from threading import Thread
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from receiver.outbound import Answer, BadAnswer, Limits, OutboundError, RedoxClient, errors
from receiver.protocol.api_keys import ApiKey
from tests.outbound.conftest import KEY, LEGACY, message, query

NAMED: Final = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, OutboundError)}
TOKEN: Final = {KEY: {"access_token": "synthetic", "expires_in": 300}, LEGACY: {"accessToken": "synthetic"}}
KEYS: Final = pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
ONCE: Final = Limits(attempts=1, read=10.0, total=20.0)
# An example makes connections, which take longer than Hypothesis' 200 ms on a loaded machine. ONCE has the bounds.
UNTIMED: Final = settings(deadline=None)


class Server:
    """Replies to one request on each connection with the next of `replies`, byte for byte, and closes it."""

    def __init__(self) -> None:
        self.replies: deque[bytes] = deque()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            with self._socket.accept()[0] as connection, suppress(OSError):
                connection.settimeout(10)
                if not self._read(connection):
                    return
                if self.replies:
                    connection.sendall(self.replies.popleft())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    pass

    def _read(self, connection: socket.socket) -> bytes:
        """Read a whole request. Returns nothing if the client closes without one."""
        got = b""
        while b"\r\n\r\n" not in got:
            if not (more := connection.recv(65_536)):
                return b""
            got += more
        head, _, body = got.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        missing = int(fields.get(b"content-length", b"0")) - len(body)
        while missing > 0 and (more := connection.recv(65_536)):
            missing -= len(more)
        return got

    def close(self) -> None:
        """Connect without a request, which ends the thread."""
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join(30)
        self._socket.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all examples."""
    with closing(Server()) as running:
        yield running


def reply(
    status: int = 200, body: bytes = b"", headers: list[tuple[bytes, bytes]] | None = None, *, length: bool = True
) -> bytes:
    """Return a reply as bytes. Without `length` its body ends with the connection."""
    framing = b"Content-Length: %d\r\n" % len(body) if length else b""
    fields = b"".join(b"%s: %s\r\n" % field for field in headers or [])
    return b"HTTP/1.1 %d Whatever\r\n%s%s\r\n%s" % (status, framing, fields, body)


def outcome(server: Server, key: ApiKey, *replies: bytes, ask: bool = False) -> Answer | OutboundError:
    """Return the answer or error of a new client for these replies. The first is the token endpoint's."""
    server.replies.clear()
    server.replies.extend(replies)
    with RedoxClient(key, base_url=server.url, limits=ONCE) as client:
        answer: Answer | OutboundError
        try:
            answer = client.query(query()) if ask else client.send(message())
        except OutboundError as exc:
            answer = exc
    assert type(answer) in {Answer, *NAMED}
    return answer


_MEMBERS = st.sampled_from(
    [
        "access_token",
        "accessToken",
        "expires_in",
        "expires",
        "token_type",
        "refreshToken",
        "error",
        "error_description",
        "Meta",
        "Errors",
        "Logs",
        "ID",
        "Type",
        "Text",
        "issue",
        "resourceType",
        "code",
        "URI",
    ]
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just("OperationOutcome")
    | st.sampled_from([10**400, -(10**400), 1 << 64, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_MEMBERS, inner, max_size=6),
)
_ODD = st.sampled_from(
    [
        b"\xff",
        b'{"access_token":"\xff"}',
        b'{"\xc3\x28":1}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"access_token":"a","expires_in":' + b"9" * 5_000 + b"}",
        b'{"accessToken":"\\ud800"}',
    ]
)
_BODIES = st.binary(max_size=60) | _ODD | _JSON.map(lambda value: json.dumps(value).encode())
_VALUES = st.binary(max_size=30).map(lambda value: value.translate(None, b"\r\n\0")) | st.sampled_from(
    [
        b"Mon, 01 Jan 0001 00:00:00 +2359",
        b"Fri, 31 Dec 9999 23:59:59 -2359",
        b"Mon, 99 Foo 2026 99:99:99 GMT",
        b"Mon, 01 Jan 99999999999 00:00:00 GMT",
        b"identity",
        b"gzip",
        b"7",
        b"\xb2",
        b"9" * 400,
        b"application/json",
    ]
)
_NAMES = st.sampled_from(
    [
        b"Date",
        b"Retry-After",
        b"X-RateLimit-Limit",
        b"Content-Encoding",
        b"Content-Type",
        b"Transfer-Encoding",
        b"Content-Length",
        b"Connection",
        b"Set-Cookie",
        b"Location",
        b"X-Any",
    ]
)
_REPLIES = st.binary(max_size=80) | st.builds(
    reply, st.integers(100, 999), _BODIES, st.lists(st.tuples(_NAMES, _VALUES), max_size=3), length=st.booleans()
)


@KEYS
def test_any_reply_of_the_token_endpoint(server: Server, key: ApiKey) -> None:
    """Any bytes, headers and statuses of the token endpoint: a named error, or a token for the message."""

    @UNTIMED
    @given(_REPLIES)
    @example(reply(body=b"\xff"))
    @example(reply(body=b'{"access_token":"a","expires_in":' + b"9" * 400 + b"}"))
    @example(reply(401, b"\xff"))
    @example(reply(401, headers=[(b"Date", b"Mon, 01 Jan 0001 00:00:00 +2359")]))
    def answered(first: bytes) -> None:
        outcome(server, key, first, reply(body=b"{}"))

    answered()


@KEYS
def test_any_reply_to_a_message(server: Server, key: ApiKey) -> None:
    """Any bytes, headers and statuses of the API, for a message and for a query: a named error, or a value."""
    token = reply(body=json.dumps(TOKEN[key]).encode())

    @UNTIMED
    @given(_REPLIES, st.booleans())
    @example(reply(body=b"\xff"), False)
    @example(reply(500, b"\xff"), True)
    def answered(second: bytes, ask: bool) -> None:
        outcome(server, key, token, second, ask=ask)

    answered()


@KEYS
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b'{"access_token": "\xff"}',
        b"<html>",
        b"[" * 5_000,
        b"{}",
        b'{"access_token": "two words", "accessToken": 7}',
    ],
)
def test_replies_without_a_token(server: Server, key: ApiKey, body: bytes) -> None:
    """A reply of 200 without a token is BadAnswer: nothing was sent, and a retry is safe."""
    error = outcome(server, key, reply(body=body))
    assert type(error) is BadAnswer
    assert (error.status, error.retryable, error.not_processed) == (200, True, True)
    assert "\\xff" not in repr(error)
    assert error.__cause__ is None


@KEYS
@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_denial_that_is_not_text(server: Server, key: ApiKey, status: int) -> None:
    """A rejection whose body is not UTF-8 is AuthenticationFailed."""
    error: Any = outcome(server, key, reply(status, b"\xff\xfe"))
    assert (type(error).__name__, error.status) == ("AuthenticationFailed", status)
