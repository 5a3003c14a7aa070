"""The adapter to ASGI 3.0: awaits the endpoints in an event loop, and calls Flask applications from one.

With `server_mode` "asgi" the endpoints are awaited directly; everything else that the listener serves is Flask's
(receiver.web.wsgi). With "flask" every request is Flask's: its views never block, and what a reply still has to wait
for is awaited here.

The parts are at work from the lifespan's startup to its shutdown: without a lifespan everything is answered 503. Must
not hold a rule of its own about requests or replies.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from typing import Any, Final, Protocol

import structlog
from flask import Flask

from receiver.errors import BadTransfer, ReceiverError
from receiver.fault_injection.faults import point
from receiver.protocol.message import Head, Reply
from receiver.web.body import SMALL, framing
from receiver.web.body import receive as receive_body
from receiver.web.client_address import ClientAddresses
from receiver.web.endpoint import UNAVAILABLE, Endpoint
from receiver.web.response_headers import Fields, fields, token_fields
from receiver.web.runtime import EventLoopRuntime, Runtime
from receiver.web.token_endpoint import TokenEndpoint
from receiver.web.wsgi import HEAD, METHODS, DeferredResponse, without_authority

log: Final = structlog.get_logger(__name__)
_access_log: Final = structlog.get_logger("receiver.access")
_access: Final = logging.getLogger("receiver.access")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

# In the state of a scope: the connection, where the server tells (receiver.server.protocol).
CONNECTION: Final = "receiver.connection"
_SERVER: Final = (b"Server", b"redox-receiver")
_NAME: Final = "[a-z0-9-]{1,64}"
_PATHS: Final = re.compile(rf"/(?:redox/{_NAME}|oauth/{_NAME}/token|livez|readyz|\.well-known/jwks\.json)/?")
_LOGGED_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
# Seconds that a body for a Flask application may take.
_BODY_TIMEOUT: Final = 15.0

_answered = point("request.answered")


class Connection(Protocol):
    """What the server's connection wants to know of a request."""

    def mark_authenticated(self) -> None:
        """The head proves whose the request is."""

    def replied(self, *, refused: bool) -> None:
        """The reply was handed over. `refused`: the client gets less time for its next request."""


class Service(Protocol):
    """What is served, from startup to shutdown."""

    def ready(self) -> bool:
        """Whether requests are served, and not answered 503 for what is wrong with this process or the database."""

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Serve one request; the status. Raises nothing but what sending raises."""

    def stop(self) -> None:
        """Stop the parts. It may wait: no request is served any more."""


class Application:
    """An ASGI application. `start` makes and starts what is served, when the lifespan begins: after fork, in the event
    loop that serves it. It may raise ReceiverError.
    """

    def __init__(self, start: Callable[[], Service]) -> None:
        self._start = start
        self._service: Service | None = None

    def ready(self) -> bool:
        """Whether it serves: a server may replace another by it."""
        return self._service is not None and self._service.ready()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000, "reason": None})
        elif scope["type"] != "http":
            raise ValueError(f"no such scope is served: {scope['type']}")
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("state", {}).get(CONNECTION)
        began = time.monotonic()
        if self._service is None:
            log.error("request.unavailable", reason="no_lifespan")
            status = await _send(send, UNAVAILABLE, fields(UNAVAILABLE))
        else:
            status = await self._service.serve(scope, receive, send)
        _answered()
        if connection is not None:
            connection.replied(refused=400 <= status < 500)
        if _access.isEnabledFor(logging.DEBUG):
            _log_access(scope, status, time.monotonic() - began)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        try:
            self._service = self._start()
        except ReceiverError as exc:
            # Logged here: a server may take an error for an application without a lifespan, and go on.
            log.error("receiver.not_started", error="; ".join(str(exc).splitlines()))
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
            return
        except Exception as exc:
            log.exception("receiver.not_started")
            await send({"type": "lifespan.startup.failed", "message": type(exc).__name__})
            return
        try:
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown: every request has its reply
        finally:
            # Also when the server ends at once, which cancels us.
            service, self._service = self._service, None
            service.stop()
        await send({"type": "lifespan.shutdown.complete"})


class PublicService:
    """The public listener. `endpoint` and `tokens` None: Flask serves them too. `flask` must never block.

    `ready` and `stop`: see Service. Made in the event loop that serves it.
    """

    def __init__(
        self,
        *,
        flask: Flask,
        endpoint: Endpoint | None,
        tokens: TokenEndpoint | None,
        trusted_proxies: Iterable[str],
        now: Callable[[], datetime],
        threads: int,
        ready: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        self._flask, self._endpoint, self._tokens = flask, endpoint, tokens
        self.ready: Final = ready
        self._addresses = ClientAddresses(trusted_proxies)
        self._now, self._stop = now, stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")
        self._runtime = EventLoopRuntime(asyncio.get_running_loop(), self._pool)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> int:
        """See Service."""
        method, path = scope["method"], without_authority(scope["path"])
        match [part for part in path.split("/") if part]:
            case ["redox", name] if self._endpoint is not None and method in METHODS:
                reply = await self._reply(self._endpoint.serve, scope, name, receive)
                return await _send(send, reply, fields(reply))
            case ["oauth", name, "token"] if self._tokens is not None and method == "POST":
                reply = await self._reply(self._tokens.serve, scope, name, receive)
                return await _send(send, reply, token_fields(reply))
            case _:
                return await self._call_flask(scope, path, receive, send)

    def stop(self) -> None:
        """See Service."""
        self._stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _reply(
        self,
        serve: Callable[[Head, AsgiTransfer, Runtime], Coroutine[Any, Any, Reply]],
        scope: Scope,
        name: str,
        receive: Receive,
    ) -> Reply:
        try:
            return await serve(self._head(scope, name), AsgiTransfer(scope, receive), self._runtime)
        except Exception:
            log.exception("request.failed")
            return replace(UNAVAILABLE, close=True)

    async def _call_flask(self, scope: Scope, path: str, receive: Receive, send: Send) -> int:
        try:
            environ = _environ(scope, path)
            environ[HEAD] = partial(self._head, scope)
            called = _call(self._flask, environ)
            if isinstance(called, DeferredResponse):
                reply = await called.serve(AsgiTransfer(scope, receive), self._runtime)
                called = _Response(reply.status, _encoded(called.fields_of(reply)), reply.body)
        except Exception:
            log.exception("request.failed")
            called = _Response(UNAVAILABLE.status, _encoded(fields(replace(UNAVAILABLE, close=True))), UNAVAILABLE.body)
        return await called.send(send)

    def _head(self, scope: Scope, name: str) -> Head:
        return _head(scope, name, self._addresses, self._now())


class BlockingService:
    """A Flask application whose views may block, each request in a thread. `stop` is called at the end."""

    def __init__(self, flask: Flask, *, threads: int, stop: Callable[[], None]) -> None:
        self._flask, self._stop = flask, stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")

    def ready(self) -> bool:
        """See Service."""
        return True

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> int:
        """See Service. A body of more than SMALL is not read: the application is told that there is none."""
        try:
            body = await self._body(scope, receive)
            environ = _environ(scope, scope["path"])
            environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            called = await asyncio.get_running_loop().run_in_executor(self._pool, _call, self._flask, environ)
            assert not isinstance(called, DeferredResponse)
        except Exception:
            log.exception("request.failed")
            called = _Response(UNAVAILABLE.status, _encoded(fields(replace(UNAVAILABLE, close=True))), UNAVAILABLE.body)
        return await called.send(send)

    def stop(self) -> None:
        """See Service."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stop()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        try:
            return await receive_body(AsgiTransfer(scope, receive), limit=SMALL) or b""
        except BadTransfer:
            return b""


class _Response:
    """A response that is known."""

    def __init__(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.status, self._headers, self._body = status, headers, body

    async def send(self, send: Send) -> int:
        """Send it; the status."""
        length = (
            ()
            if any(name.lower() == b"content-length" for name, _ in self._headers)
            else ((b"Content-Length", b"%d" % len(self._body)),)
        )
        await send({"type": "http.response.start", "status": self.status, "headers": [*self._headers, *length]})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})
        return self.status


def _call(app: Flask, environ: dict[str, Any]) -> _Response | DeferredResponse:
    """Call a WSGI application (PEP 3333). Raises what it raises."""
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], None]:  # noqa: ARG001
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
    return _Response(status, (*encoded, _SERVER), b"".join(written))


def _environ(scope: Scope, path: str) -> dict[str, Any]:
    """The WSGI environment of a request (PEP 3333), without its body.

    A header whose name has an underscore is dropped: it could not be told from one with a hyphen. So is Upgrade, which
    is not followed here, and which werkzeug would look for another route by.
    """
    host, port = scope.get("server") or ("localhost", 80)
    client = scope.get("client")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": path.encode().decode("latin-1"),
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
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").upper()
        if "_" in name or name == "UPGRADE":
            continue
        key = name.replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        text = value.decode("latin-1")
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


class AsgiTransfer:
    """A body out of ASGI's receive. A message that ASGI's HTTP does not know is taken for a malformed body."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope, self._receive = scope, receive
        self._rest = b""
        self._more = True

    @cached_property
    def length(self) -> int | None:
        """See `Transfer`."""
        announced = coding = b""
        for name, value in self._scope["headers"]:
            if name == b"content-length":
                announced = announced + b"," + value if announced else value
            elif name == b"transfer-encoding":
                coding = coding + b"," + value if coding else value
        # HTTP/2 frames bodies by itself, and needs no field that says so.
        if not announced and self._scope["http_version"] not in ("1.0", "1.1"):
            return None
        return framing(announced.decode("latin-1"), coding.decode("latin-1"))

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
        connection: Connection | None = self._scope.get("state", {}).get(CONNECTION)
        if connection is not None:
            connection.mark_authenticated()


def _head(scope: Mapping[str, Any], destination: str, addresses: ClientAddresses, now: datetime) -> Head:
    """The head of a request, with the values of the wire."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    client = scope["client"]
    remote = client[0] if client else ""  # a Unix socket's has no address
    return Head(
        destination=destination,
        method=scope["method"],
        headers=headers,
        target=without_authority((scope.get("raw_path") or scope["path"].encode()).decode("latin-1")),
        query=scope["query_string"].decode("latin-1"),
        peer=addresses.name(remote, headers.get("x-forwarded-for")),
        proxied=addresses.trusted(remote),
        received_at=now,
    )


async def _send(send: Send, reply: Reply, found: Fields) -> int:
    return await _Response(reply.status, _encoded(found), reply.body).send(send)


@lru_cache(maxsize=64)
def _encoded(found: Fields) -> tuple[tuple[bytes, bytes], ...]:
    return (*((name.encode("ascii"), value.encode("ascii")) for name, value in found), _SERVER)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    """Log a request that was served, at level debug alone.

    No query string: it holds the token of a handshake by GET.
    """
    path, client, method = scope["path"], scope.get("client"), scope["method"]
    _access_log.debug(
        "request.served",
        method=method if method in _LOGGED_METHODS else "other",
        path=path if _PATHS.fullmatch(path) else "other",
        status=status,
        ms=round(seconds * 1000, 1),
        peer=client[0] if client else None,
    )
