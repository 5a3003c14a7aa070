"""An ASGI 3.0 response, from a reply or from a Flask application.

Must not add a header field but Server and Content-Length.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Any, Final

from flask import Flask

from receiver.protocol.message import Reply
from receiver.web.response_headers import Fields
from receiver.web.wsgi import DeferredResponse

Send = Callable[[Any], Awaitable[None]]

_SERVER: Final = (b"Server", b"redox-receiver")


class AsgiResponse:
    """A complete response."""

    def __init__(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.status, self._headers, self._body = status, headers, body

    async def send(self, send: Send) -> int:
        """Send it; return the status."""
        length = (
            ()
            if any(name.lower() == b"content-length" for name, _ in self._headers)
            else ((b"Content-Length", b"%d" % len(self._body)),)
        )
        await send({"type": "http.response.start", "status": self.status, "headers": [*self._headers, *length]})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})
        return self.status


def response_of(reply: Reply, fields: Fields) -> AsgiResponse:
    """The response of a reply, with these header fields."""
    return AsgiResponse(reply.status, _encoded(fields), reply.body)


@lru_cache(maxsize=64)
def _encoded(fields: Fields) -> tuple[tuple[bytes, bytes], ...]:
    return (*((name.encode("ascii"), value.encode("ascii")) for name, value in fields), _SERVER)


def call_wsgi(app: Flask, environ: dict[str, Any]) -> AsgiResponse | DeferredResponse:
    """Call a WSGI application (PEP 3333). Raises what it raises."""
    started: list[Any] = []

    def start_response(
        status: str,
        headers: list[tuple[str, str]],
        exc_info: object = None,  # noqa: ARG001 - PEP 3333's
    ) -> Callable[[bytes], None]:
        started[:] = [int(status[:3]), headers]
        return written.append

    written: list[bytes] = []
    result = app(environ, start_response)
    if isinstance(result, DeferredResponse):
        return result
    try:
        written += result
    finally:
        if hasattr(result, "close"):
            result.close()
    status, headers = started
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return AsgiResponse(status, (*encoded, _SERVER), b"".join(written))
