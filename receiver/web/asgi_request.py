"""An ASGI 3.0 request: its head, its body and its WSGI environment.

The header is decoded once for all of them. Must not hold a rule of its own about requests.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Protocol

from receiver.errors import BadTransfer
from receiver.protocol.message import Head
from receiver.web.body import framing
from receiver.web.client_address import ClientAddresses
from receiver.web.wsgi import without_authority

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]

# The key of the ServerConnection in the state of a scope. receiver.server.protocol sets it; other servers do not.
CONNECTION: Final = "receiver.connection"


class ServerConnection(Protocol):
    """The server's connection of a request. It receives events that the server cannot see itself."""

    def mark_authenticated(self) -> None:
        """The head authenticates the request."""

    def replied(self, *, refused: bool) -> None:
        """The reply was handed to the server. `refused`: the client gets less time for its next request."""


class AsgiRequest:
    """A request, and the `Transfer` of its body. An event that ASGI does not define makes the body malformed."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope, self._receive = scope, receive
        self.method: Final[str] = scope["method"]
        self.path: Final = without_authority(scope["path"])
        self._headers: dict[str, str] | None = None
        self._rest = b""
        self._more = True

    @property
    def headers(self) -> dict[str, str]:
        """The header fields, as `Head` describes them. A cached_property would take a lock for each request."""
        if self._headers is None:
            self._headers = _decoded(self._scope["headers"])
        return self._headers

    def head(self, destination: str, addresses: ClientAddresses, now: datetime) -> Head:
        """The head, with the values of the wire."""
        scope = self._scope
        client = scope["client"]
        remote = client[0] if client else ""  # a Unix socket's client has no address
        return Head(
            destination=destination,
            method=scope["method"],
            headers=self.headers,
            target=without_authority((scope.get("raw_path") or scope["path"].encode()).decode("latin-1")),
            query=scope["query_string"].decode("latin-1"),
            peer=addresses.name(remote, self.headers.get("x-forwarded-for")),
            proxied=addresses.trusted(remote),
            received_at=now,
        )

    def environ(self) -> dict[str, Any]:
        """The WSGI environment (PEP 3333), without the body.

        A field with an underscore in its name is dropped, because it would look the same as one with a hyphen. So is
        Upgrade: it is not supported, and werkzeug would choose another route for it.
        """
        scope = self._scope
        host, port = scope.get("server") or ("localhost", 80)
        client = scope.get("client")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": self.path.encode().decode("latin-1"),
            "QUERY_STRING": scope["query_string"].decode("latin-1"),
            "SERVER_NAME": host,
            "SERVER_PORT": str(port or 80),
            "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
            "REMOTE_ADDR": client[0] if client else "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope.get("scheme", "http"),
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }
        for name, text in self.headers.items():
            key = _environ_key(name)
            if key is not None:
                environ[key] = text
        return environ

    @property
    def length(self) -> int | None:
        """See `Transfer`."""
        announced = self.headers.get("content-length", "")
        # HTTP/2 has its own framing of bodies and needs no header field for it.
        if not announced and self._scope["http_version"] not in ("1.0", "1.1"):
            return None
        return framing(announced, self.headers.get("transfer-encoding", ""))

    async def read(self, size: int, seconds: float) -> bytes:
        """See `Transfer`."""
        while not self._rest and self._more:
            try:
                async with asyncio.timeout(seconds):
                    message = await self._receive()
            except TimeoutError:
                raise BadTransfer("body_too_slow") from None
            if message["type"] == "http.request":
                self._rest, self._more = message.get("body", b""), message.get("more_body", False)
            else:
                self._more = False
                if self.length is None or message["type"] != "http.disconnect":
                    raise BadTransfer("body_malformed")
        if len(self._rest) <= size:
            piece, self._rest = self._rest, b""
        else:
            piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def mark_authenticated(self) -> None:
        """See `Transfer`."""
        connection = connection_of(self._scope)
        if connection is not None:
            connection.mark_authenticated()


def _decoded(given: Collection[tuple[bytes, bytes]]) -> dict[str, str]:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in given}
    if len(headers) < len(given):  # a field was sent twice
        headers = {}
        for raw, value in given:
            name, text = raw.decode("latin-1"), value.decode("latin-1")
            headers[name] = f"{headers[name]},{text}" if name in headers else text
    return headers


def connection_of(scope: Scope) -> ServerConnection | None:
    """The connection of a request; None if the server has set none."""
    connection: ServerConnection | None = scope.get("state", {}).get(CONNECTION)
    return connection


@lru_cache(256)
def _environ_key(name: str) -> str | None:
    """The key of a header field in a WSGI environment; None if it is dropped."""
    key = name.upper().replace("-", "_")
    if "_" in name or key == "UPGRADE":
        return None
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
