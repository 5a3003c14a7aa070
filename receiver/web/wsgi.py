"""The public application in Flask: `/redox/<destination>`, `/oauth/<destination>/token`, `/.well-known/jwks.json`,
`/livez`, and nothing else.

Its views never block. Where an endpoint has to wait, the view returns a `DeferredResponse`: receiver.web.asgi awaits it
in its event loop, and any WSGI server iterates over it, which blocks the thread.

A path is compared by segments: doubled or trailing slashes change nothing, so that each path has one route. Must not
send a page or a header field that is not defined here: no cookies, sessions, redirects or forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from receiver.errors import BadTransfer
from receiver.protocol.message import Head, Reply
from receiver.web import jwks
from receiver.web.body import Transfer, discarded, framing
from receiver.web.client_address import ClientAddresses
from receiver.web.endpoint import Endpoint
from receiver.web.replies import UNAVAILABLE
from receiver.web.response_headers import Fields, fields, token_fields
from receiver.web.runtime import Runtime, ThreadRuntime, drive
from receiver.web.token_endpoint import TokenEndpoint

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log: Final = structlog.get_logger(__name__)

METHODS: Final = ("GET", "POST")
# The key under which receiver.web.asgi adds a function to the environment: it makes the head for a destination's name,
# at less cost than from the environment.
HEAD: Final = "receiver.head"
_AUTHORITY: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")

Serve = Callable[[Transfer, Runtime], Coroutine[Any, Any, Reply]]


class PublicApp(Flask):
    """A Flask application whose routes ignore doubled and trailing slashes."""

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve the request with a normalized PATH_INFO."""
        environ["PATH_INFO"] = "/" + "/".join(filter(None, environ.get("PATH_INFO", "").split("/")))
        if HEAD not in environ:
            start_response = _without_connection(start_response)
        return super().wsgi_app(environ, start_response)


def _without_connection(start_response: StartResponse) -> StartResponse:
    """For a WSGI server, which decides about the connection itself: PEP 3333 forbids an application to send Connection,
    and servers such as waitress answer 500 to one that does.
    """

    def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        return start_response(status, [each for each in headers if each[0] != "Connection"], *exc_info)

    return start


def _utc_now() -> datetime:
    return datetime.now(UTC)


def public_app(
    endpoint: Endpoint,
    *,
    trusted_proxies: Iterable[str],
    tokens: TokenEndpoint | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> PublicApp:
    """The application. `trusted_proxies`: addresses and networks whose X-Forwarded-For is used.

    `tokens`: None for no token endpoint. `now`: the clock for all decisions.
    """
    app = PublicApp(__name__, static_folder=None)
    addresses = ClientAddresses(trusted_proxies)

    def head(name: str) -> Head:
        environ = request.environ
        made = environ.get(HEAD)
        found: Head = _head(environ, name, addresses, now()) if made is None else made(name)
        return found

    @app.route("/redox/<name>", methods=METHODS, provide_automatic_options=False)
    def destination(name: str) -> Response:
        if request.environ["REQUEST_METHOD"] not in METHODS:  # werkzeug adds HEAD to GET
            raise MethodNotAllowed(METHODS)
        return _Deferred(partial(endpoint.serve, head(name)), fields)

    @app.route("/livez", methods=["GET"], provide_automatic_options=False)
    def livez() -> Response:
        return respond(Reply(status=200, body=b"ok\n"))

    if tokens is not None:

        @app.route("/oauth/<name>/token", methods=["POST"], provide_automatic_options=False)
        def token(name: str) -> Response:
            return _Deferred(partial(tokens.serve, head(name)), token_fields)

    jwks.publish(app, endpoint.registry, lambda: respond(UNAVAILABLE))

    @app.errorhandler(Exception)
    def fault(exc: Exception) -> Response:
        status = exc.code or 400 if isinstance(exc, HTTPException) else 500
        if status >= 500:
            log.error("request.failed", exc_info=exc)
            return respond(UNAVAILABLE, close=True)
        reply = Reply(status=status, body=_FAULTS.get(status, b"bad request\n"))
        response = respond(reply, close=not _discarded(request.environ))
        if isinstance(exc, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(set(exc.valid_methods or ()) & set(METHODS)))
        return response

    return app


_FAULTS: Final = {404: b"not found\n", 405: b"method not allowed\n"}


def respond(reply: Reply, *, close: bool = False) -> Response:
    """The Flask response of a reply."""
    return Response(
        reply.body, status=reply.status, headers=list(fields(replace(reply, close=True) if close else reply))
    )


class _Deferred(Response):
    """The response of a view that does not have its reply yet."""

    def __init__(self, serve: Serve, fields_of: Callable[[Reply], Fields]) -> None:
        super().__init__()
        self._serve, self._fields_of = serve, fields_of

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> DeferredResponse:
        """As a WSGI application."""
        return DeferredResponse(self._serve, self._fields_of, environ, start_response)


class DeferredResponse:
    """The body of a response that waits for its reply.

    Under a WSGI server, iterating over it waits and then calls `start_response`, as PEP 3333 allows. In an event loop,
    receiver.web.asgi awaits `serve` and sends the reply with `fields_of`.
    """

    def __init__(
        self,
        serve: Serve,
        fields_of: Callable[[Reply], Fields],
        environ: WSGIEnvironment,
        start_response: StartResponse,
    ) -> None:
        self.serve: Final = serve
        self.fields_of: Final = fields_of
        self._environ, self._start_response = environ, start_response

    def __iter__(self) -> Iterator[bytes]:
        reply = drive(self.serve(WsgiTransfer(self._environ), ThreadRuntime()))
        self._start_response(
            f"{reply.status} {HTTPStatus(reply.status).phrase}",
            [*self.fields_of(reply), ("Content-Length", str(len(reply.body)))],
        )
        return iter((reply.body,))


class WsgiTransfer:
    """The body in a WSGI environment (PEP 3333); reading blocks.

    A chunked body is read if the server marks its end (`wsgi.input_terminated`), as gunicorn does. The server decides
    how long a read takes: a slow sender is noticed between two reads.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._environ = environ

    @cached_property
    def length(self) -> int | None:
        """See `Transfer`."""
        length = framing(self._environ.get("CONTENT_LENGTH") or "", self._environ.get("HTTP_TRANSFER_ENCODING", ""))
        if length is None and not self._environ.get("wsgi.input_terminated"):
            raise BadTransfer("body_malformed")
        return length

    async def read(self, size: int, seconds: float) -> bytes:  # noqa: ARG002 - Transfer's
        """See `Transfer`."""
        try:
            piece: bytes = self._environ["wsgi.input"].read(size)
        except Exception as exc:
            # Each server has its own errors for malformed chunks and for senders that have gone.
            raise BadTransfer("body_malformed") from exc
        return piece

    def mark_authenticated(self) -> None:
        """See `Transfer`: a WSGI server has no place for it."""


def _discarded(environ: WSGIEnvironment) -> bool:
    try:
        return discarded(WsgiTransfer(environ).length)
    except BadTransfer:
        return False


def _head(environ: WSGIEnvironment, destination: str, addresses: ClientAddresses, now: datetime) -> Head:
    headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
    headers |= {
        key.replace("_", "-").lower(): environ[key] for key in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(key)
    }
    target, query = _raw(environ)
    remote = environ.get("REMOTE_ADDR", "")
    return Head(
        destination=destination,
        method=environ["REQUEST_METHOD"],
        headers=headers,
        target=target,
        query=query,
        peer=addresses.name(remote, headers.get("x-forwarded-for")),
        proxied=addresses.trusted(remote),
        received_at=now,
    )


def _raw(environ: dict[str, Any]) -> tuple[str, str]:
    """Path and query as they were sent: the request target of RFC 9112 section 3.2, without scheme and host.

    PEP 3333 does not have it. Where the server does not add it either, the path is encoded anew: a signature over
    another spelling of it does not verify then.
    """
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    if not raw:
        return quote(environ.get("PATH_INFO", "").encode("latin-1")), environ.get("QUERY_STRING", "")
    target, _, query = without_authority(raw).partition("?")
    return target, query


def without_authority(target: str) -> str:
    """A request target without its scheme and host, if it has them (RFC 9112 section 3.2.2)."""
    authority = None if target.startswith("/") else _AUTHORITY.match(target)
    return target[authority.end() :] if authority else target
