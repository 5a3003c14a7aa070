"""The adapter to ASGI 3.0: awaits the endpoints in an event loop, and calls Flask applications from it.

With `server_mode` "asgi" it awaits the endpoints directly, and Flask serves all other paths of the listener
(receiver.web.wsgi). With "flask" it calls Flask for every request: the views never block, and this adapter awaits the
deferred responses.

The services run from the lifespan's startup to its shutdown. Without a lifespan every reply is 503. Must not hold a
rule of its own about requests or replies.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol

import structlog
from flask import Flask

from receiver.errors import BadTransfer, ReceiverError
from receiver.fault_injection.faults import point
from receiver.protocol.message import Head, Reply
from receiver.web.asgi_request import AsgiRequest, Receive, Scope, connection_of
from receiver.web.asgi_response import AsgiResponse, Send, call_wsgi, response_of
from receiver.web.body import SMALL, receive
from receiver.web.client_address import ClientAddresses
from receiver.web.endpoint import Endpoint
from receiver.web.replies import UNAVAILABLE
from receiver.web.response_headers import fields, token_fields
from receiver.web.runtime import EventLoopRuntime, Runtime
from receiver.web.token_endpoint import TokenEndpoint
from receiver.web.wsgi import HEAD, METHODS, DeferredResponse

log: Final = structlog.get_logger(__name__)
_access_log: Final = structlog.get_logger("receiver.access")
_access: Final = logging.getLogger("receiver.access")

_NAME: Final = "[a-z0-9-]{1,64}"
_PATHS: Final = re.compile(rf"/(?:redox/{_NAME}|oauth/{_NAME}/token|livez|readyz|\.well-known/jwks\.json)/?")
_LOGGED_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
# The reply to an error of the receiver. It closes: how much of the request was read is not known.
_FAULT: Final = replace(UNAVAILABLE, close=True)

_answered = point("request.answered")


class Service(Protocol):
    """What an application serves from startup to shutdown."""

    def ready(self) -> bool:
        """Whether requests are served: False while this process or the database has a problem and replies are 503."""

    async def serve(self, request: AsgiRequest, send: Send) -> int:
        """Serve one request and return the status. Raises only what `send` raises."""

    def stop(self) -> None:
        """Stop the service. It may block: no more requests are served."""


class Application:
    """An ASGI application. `start` makes and starts its service when the lifespan begins: after fork, in the event loop
    that serves it. It may raise ReceiverError.
    """

    def __init__(self, start: Callable[[], Service]) -> None:
        self._start = start
        self._service: Service | None = None

    def ready(self) -> bool:
        """Whether it serves, so that it may replace another process."""
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
        began = time.monotonic()
        if self._service is None:
            log.error("request.unavailable", reason="no_lifespan")
            status = await response_of(UNAVAILABLE, fields(UNAVAILABLE)).send(send)
        else:
            status = await self._service.serve(AsgiRequest(scope, receive), send)
        _answered()
        if (connection := connection_of(scope)) is not None:
            connection.replied(refused=400 <= status < 500)
        if _access.isEnabledFor(logging.DEBUG):
            _log_access(scope, status, time.monotonic() - began)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        try:
            self._service = self._start()
        except ReceiverError as exc:
            # Logged here: a server may mistake the error for an application without a lifespan, and continue.
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
            # Also when the server ends at once and cancels this task.
            service, self._service = self._service, None
            service.stop()
        await send({"type": "lifespan.shutdown.complete"})


class PublicService:
    """The public listener. `endpoint`, `tokens`: None if Flask serves them. `flask` must never block.

    `ready`, `stop`: see Service. Make it in the event loop that serves it.
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

    async def serve(self, request: AsgiRequest, send: Send) -> int:
        """See Service."""
        match [part for part in request.path.split("/") if part]:
            case ["redox", name] if self._endpoint is not None and request.method in METHODS:
                reply = await self._reply(self._endpoint.serve, request, name)
                response = response_of(reply, fields(reply))
            case ["oauth", name, "token"] if self._tokens is not None and request.method == "POST":
                reply = await self._reply(self._tokens.serve, request, name)
                response = response_of(reply, token_fields(reply))
            case _:
                response = await self._call_flask(request)
        return await response.send(send)

    def stop(self) -> None:
        """See Service."""
        self._stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _reply(
        self, serve: Callable[[Head, AsgiRequest, Runtime], Coroutine[Any, Any, Reply]], request: AsgiRequest, name: str
    ) -> Reply:
        try:
            return await serve(self._head(request, name), request, self._runtime)
        except Exception:
            log.exception("request.failed")
            return _FAULT

    async def _call_flask(self, request: AsgiRequest) -> AsgiResponse:
        try:
            environ = request.environ()
            environ[HEAD] = partial(self._head, request)
            called = call_wsgi(self._flask, environ)
            if isinstance(called, DeferredResponse):
                reply = await called.serve(request, self._runtime)
                called = response_of(reply, called.fields_of(reply))
        except Exception:
            log.exception("request.failed")
            called = response_of(_FAULT, fields(_FAULT))
        return called

    def _head(self, request: AsgiRequest, name: str) -> Head:
        return request.head(name, self._addresses, self._now())


class BlockingService:
    """A Flask application whose views may block: each request gets a thread. `stop` is called at the end."""

    def __init__(self, flask: Flask, *, threads: int, stop: Callable[[], None]) -> None:
        self._flask, self._stop = flask, stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")

    def ready(self) -> bool:
        """See Service."""
        return True

    async def serve(self, request: AsgiRequest, send: Send) -> int:
        """See Service. A body of more than SMALL bytes is not read: for the application the body is empty."""
        try:
            body = await self._body(request)
            environ = request.environ() | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            called = await asyncio.get_running_loop().run_in_executor(self._pool, call_wsgi, self._flask, environ)
            assert not isinstance(called, DeferredResponse)
        except Exception:
            log.exception("request.failed")
            called = response_of(_FAULT, fields(_FAULT))
        return await called.send(send)

    def stop(self) -> None:
        """See Service."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stop()

    async def _body(self, request: AsgiRequest) -> bytes:
        try:
            return await receive(request, limit=SMALL) or b""
        except BadTransfer:
            return b""


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
