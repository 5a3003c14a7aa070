"""The public listener in Flask: `/redox/<destination>`, `/oauth/<destination>/token`, `/.well-known/jwks.json`,
`/livez`, and nothing else.

A path is compared as segments: slashes that are doubled or trail change nothing, so no spelling of a path reaches
anything by another way. May not answer with a page, a word or a header that is not written here: no cookies, no
sessions, no redirects, no forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from receiver.errors import BadTransfer
from receiver.protocol.message import Head, Reply
from receiver.web import jwks
from receiver.web.answers import Fields, fields, token_fields
from receiver.web.door import UNAVAILABLE, Door
from receiver.web.peers import Peers
from receiver.web.pending import Pending
from receiver.web.steps import Walk
from receiver.web.tokens import TokenDoor
from receiver.web.transfer import framing

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log: Final = structlog.get_logger(__name__)

METHODS: Final = ("GET", "POST")
AUTHORITY: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")


class PublicApp(Flask):
    """A Flask application that finds its routes whatever slashes are in the path.

    It waits for nothing but for a body to come in, and so may be called where there is no thread to wait: what takes
    its time is Pending.
    """

    never_waits: Final = True

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve, with PATH_INFO brought to one spelling."""
        environ["PATH_INFO"] = "/" + "/".join(filter(None, environ.get("PATH_INFO", "").split("/")))
        return super().wsgi_app(environ, start_response)


def _here() -> datetime:
    return datetime.now(UTC)


def public_app(door: Door, *, trusted_proxies: Iterable[str], tokens: TokenDoor | None = None,
               now: Callable[[], datetime] = _here) -> PublicApp:
    """The application. `trusted_proxies`: addresses and networks whose X-Forwarded-For is believed.

    `tokens` None: there is no token endpoint. `now`: the clock by which everything is judged.
    """
    app = PublicApp(__name__, static_folder=None)
    peers = Peers(trusted_proxies)

    @app.route("/redox/<name>", methods=METHODS, provide_automatic_options=False)
    def destination(name: str) -> Response:
        environ = request.environ
        if environ["REQUEST_METHOD"] not in METHODS:  # werkzeug lets HEAD in where GET is
            raise MethodNotAllowed(METHODS)
        transfer = WsgiTransfer(environ)
        return _Later(Walk(door.steps(_head(environ, name, peers, now()), transfer.length), transfer), fields)

    @app.route("/livez", methods=["GET"], provide_automatic_options=False)
    def livez() -> Response:
        return respond(Reply(status=200, body=b"ok\n"))

    if tokens is not None:
        @app.route("/oauth/<name>/token", methods=["POST"], provide_automatic_options=False)
        def token(name: str) -> Response:
            environ = request.environ
            transfer = WsgiTransfer(environ)
            return _Later(Walk(tokens.steps(_head(environ, name, peers, now()), transfer.length), transfer),
                          token_fields)

    jwks.publish(app, door.registry, lambda: respond(UNAVAILABLE))

    @app.errorhandler(Exception)
    def fault(exc: Exception) -> Response:
        status = exc.code or 400 if isinstance(exc, HTTPException) else 500
        if status >= 500:
            log.error("request.failed", exc_info=exc)
            return respond(UNAVAILABLE, close=True)
        reply = Reply(status=status, body=_FAULTS.get(status, b"bad request\n"))
        response = respond(reply, close=WsgiTransfer(request.environ).length != 0)
        if isinstance(exc, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(set(exc.valid_methods or ()) & set(METHODS)))
        return response

    return app


_FAULTS: Final = {404: b"not found\n", 405: b"method not allowed\n"}


def respond(reply: Reply, *, close: bool = False) -> Response:
    """The response that says `reply`."""
    return Response(reply.body, status=reply.status,
                    headers=list(fields(replace(reply, close=True) if close else reply)))


class _Later(Response):
    """A response that is known when its steps have been taken: see Pending. `fields_of`: the header fields of it."""

    def __init__(self, walk: Walk[Reply], fields_of: Callable[[Reply], Fields]) -> None:
        super().__init__()
        self._walk, self._fields_of = walk, fields_of

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Pending:  # noqa: ARG002 - WSGI's
        """As a WSGI application."""
        return Pending(self._walk, self._fields_of, start_response)


class WsgiTransfer:
    """A body out of a WSGI environment (PEP 3333).

    Chunks are read where the server says that it marks their end (`wsgi.input_terminated`), as gunicorn does.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        length, ends = framing(environ.get("CONTENT_LENGTH") or "", coded="HTTP_TRANSFER_ENCODING" in environ)
        self.length: Final = length
        self._ends = ends and (length is not None or bool(environ.get("wsgi.input_terminated")))
        self._environ = environ

    def read(self, size: int) -> bytes:
        """At most `size` bytes. Raises BadTransfer `body_malformed`."""
        if not self._ends:
            raise BadTransfer("body_malformed")
        try:
            piece: bytes = self._environ["wsgi.input"].read(size)
        except Exception as exc:
            # Servers have errors of their own for chunks that are none and for senders that went away.
            raise BadTransfer("body_malformed") from exc
        return piece


def _head(environ: WSGIEnvironment, destination: str, peers: Peers, now: datetime) -> Head:
    headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
    headers |= {key.replace("_", "-").lower(): environ[key] for key in ("CONTENT_TYPE", "CONTENT_LENGTH")
                if environ.get(key)}
    target, query = _raw(environ)
    remote = environ.get("REMOTE_ADDR", "")
    return Head(destination=destination, method=environ["REQUEST_METHOD"], headers=headers, target=target, query=query,
                peer=peers.name(remote, headers.get("x-forwarded-for")), proxied=peers.trusted(remote),
                received_at=now)


def _raw(environ: dict[str, Any]) -> tuple[str, str]:
    """Path and query as they were sent: the request target of RFC 9112 section 3.2, without scheme and host."""
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    authority = AUTHORITY.match(raw)
    target, _, query = raw[authority.end() if authority else 0:].partition("?")
    return target, query
