"""The public listener as an ASGI application: `gunicorn -k asgi receiver.web.asgi:application`.

The steps of the doors (receiver.web.door, receiver.web.tokens) are taken in the event loop; what waits for a handler or
a database, and what works through a large body, is done in a pool of threads. Everything else that the listener serves
is Flask's (receiver.web.public), asked through asgiref.

The parts are at work from the lifespan's startup to its shutdown: without a lifespan everything is answered 503. May
not hold a rule of its own about requests or answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from asgiref.wsgi import WsgiToAsgi

from receiver import logs
from receiver.app import PublicListener, compose
from receiver.errors import BadTransfer, ReceiverError
from receiver.protocol.message import Head, Reply
from receiver.web.answers import Fields, fields, token_fields
from receiver.web.door import UNAVAILABLE
from receiver.web.peers import Peers
from receiver.web.public import AUTHORITY, METHODS
from receiver.web.steps import Read, Steps, T, Wait
from receiver.web.transfer import framing

if TYPE_CHECKING:
    from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope, Scope

log: Final = structlog.get_logger(__name__)


class Application:
    """The application. `open_listener` makes what is served, when the lifespan begins; it may raise ReceiverError."""

    def __init__(self, open_listener: Callable[[], PublicListener]) -> None:
        self._open = open_listener
        self._served: _Served | None = None

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one connection scope (ASGI 3.0)."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000, "reason": None})
        elif scope["type"] != "http":
            raise ValueError(f"no such scope is served: {scope['type']}")
        elif self._served is None:
            log.error("request.unavailable", reason="no_lifespan")
            await _answer(send, UNAVAILABLE, fields(UNAVAILABLE))
        else:
            await self._served.serve(scope, receive, send)

    async def _live(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()  # lifespan.startup
        try:
            listener = self._open()
            listener.start()
        except ReceiverError as exc:
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
            return
        except Exception as exc:
            # Told here: some servers take an error for an application without a lifespan, and go on.
            log.exception("receiver.not_started")
            await send({"type": "lifespan.startup.failed", "message": type(exc).__name__})
            return
        pool = ThreadPoolExecutor(listener.settings.threads, thread_name_prefix="request")
        try:
            self._served = _Served(listener, pool, asyncio.get_running_loop())
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown: whoever was served has the answer
        finally:
            # Also when the server ends at once, which cancels us. It may wait: nobody else is served any more.
            self._served = None
            listener.stop()
            pool.shutdown(wait=False, cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})


class _Served:
    """The listener in one event loop."""

    def __init__(self, listener: PublicListener, pool: Executor, loop: asyncio.AbstractEventLoop) -> None:
        self._door, self._tokens = listener.door, listener.tokens
        self._peers = Peers(listener.settings.trusted_proxies)
        self._now = listener.now
        self._pool = pool
        self._bell = Bell(loop)
        self._rest: Any = WsgiToAsgi(listener.flask())  # type: ignore[no-untyped-call]  # asgiref has not typed it

    async def serve(self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request. Raises nothing but what sending raises."""
        path = _without_authority(scope["path"])
        match [part for part in path.split("/") if part]:
            case ["redox", name] if scope["method"] in METHODS:
                reply = await self._reply(self._door.steps, scope, name, receive)
                await _answer(send, reply, fields(reply))
            case ["oauth", name, "token"] if scope["method"] == "POST":
                reply = await self._reply(self._tokens.steps, scope, name, receive)
                await _answer(send, reply, token_fields(reply))
            case _:
                await self._rest(scope | {"path": path}, _no_body, partial(_named, send))

    async def _reply(self, steps: Callable[[Head, int | None], Steps[Reply]], scope: HTTPScope, name: str,
                     receive: ASGIReceiveCallable) -> Reply:
        try:
            transfer = AsgiTransfer(scope, receive)
            return await self._take(steps(_head(scope, name, self._peers, self._now()), transfer.length), transfer)
        except Exception:
            log.exception("request.failed")
            return replace(UNAVAILABLE, close=True)

    async def _take(self, steps: Steps[T], transfer: AsgiTransfer) -> T:
        """Take the steps as `receiver.web.steps.take` does, while others are served. Raises what they raise."""
        came: Any = None
        failed: Exception | None = None
        try:
            while True:
                step = steps.send(came) if failed is None else steps.throw(failed)
                came = failed = None
                try:
                    if isinstance(step, Read):
                        came = await transfer.read(step.size)
                    elif isinstance(step, Wait):
                        came = await self._bell.outcome(step)
                    else:
                        came = await asyncio.get_running_loop().run_in_executor(self._pool, step.call)
                except Exception as exc:  # noqa: BLE001 - it is theirs who asked for it
                    failed = exc
        except StopIteration as end:
            outcome: T = end.value
            return outcome
        finally:
            steps.close()  # when the server gave the request up, what it holds is given back


class Bell:
    """Tells an event loop of futures that end in another thread: one call into the loop for all that ended together.

    The writer ends a whole batch at once; a call for each (asyncio.wrap_future) wakes the loop as many times.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ended: deque[asyncio.Future[None]] = deque()
        self._rung = False
        self._hasten: dict[Callable[[], None], None] = {}

    async def outcome(self, step: Wait) -> Any:
        """What its future holds. Raises what it raises; TimeoutError after so many seconds."""
        waiter = self._loop.create_future()
        if not self._hasten:  # once for all that begin to wait in this turn of the loop
            self._loop.call_soon(self._say_so)
        self._hasten[step.hasten] = None
        step.future.add_done_callback(partial(self._ring, waiter))
        late = self._loop.call_later(step.seconds, _give_up, waiter)
        try:
            await waiter
        finally:
            late.cancel()
        return step.future.result(0)

    def _say_so(self) -> None:
        while self._hasten:
            self._hasten.popitem()[0]()

    def _ring(self, waiter: asyncio.Future[None], _ended: Future[Any]) -> None:
        self._ended.append(waiter)
        if not self._rung:
            self._rung = True
            # An error: the loop has ended, and nobody waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._rung = False  # first: what ends from now on rings again
        while self._ended:
            waiter = self._ended.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class AsgiTransfer:
    """A body out of ASGI's receive.

    A server that knows that the body was malformed, and not only broken off, says so in `malformed` (ours does). What
    is no message of a body (ASGI: HTTP) is taken for a malformed one.
    """

    def __init__(self, scope: HTTPScope, receive: ASGIReceiveCallable) -> None:
        announced = b",".join(value for name, value in scope["headers"] if name == b"content-length").decode("latin-1")
        # HTTP/2 frames bodies by itself, and needs no field that says so.
        coded = any(name == b"transfer-encoding" for name, _ in scope["headers"]) or (
            not announced and scope["http_version"] not in ("1.0", "1.1"))
        length, self._ends = framing(announced, coded=coded)
        self.length: Final = length
        self._receive = receive
        self._rest = b""
        self._more = True

    async def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end, or when the sender has gone. Raises BadTransfer `body_malformed`."""
        if not self._ends:
            raise BadTransfer("body_malformed")
        while not self._rest and self._more:
            message: Any = await self._receive()
            if message["type"] == "http.request":
                self._rest, self._more = message.get("body", b""), message.get("more_body", False)
            else:
                self._more = False
                if self.length is None or message["type"] != "http.disconnect" or message.get("malformed"):
                    raise BadTransfer("body_malformed")
        if len(self._rest) <= size:
            piece, self._rest = self._rest, b""
        else:
            piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _head(scope: HTTPScope, destination: str, peers: Peers, now: datetime) -> Head:
    """The head of a request, with the values of the wire."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    client = scope["client"]
    remote = client[0] if client else ""  # a Unix socket's has no address
    method: Any = scope["method"]
    return Head(destination=destination, method=method, headers=headers,
                target=_without_authority((scope.get("raw_path") or scope["path"].encode()).decode("latin-1")),
                query=scope["query_string"].decode("latin-1"), peer=peers.name(remote, headers.get("x-forwarded-for")),
                proxied=peers.trusted(remote), received_at=now)


def _without_authority(target: str) -> str:
    """A request target without scheme and host, where it has them (RFC 9112 section 3.2.2)."""
    authority = None if target.startswith("/") else AUTHORITY.match(target)
    return target[authority.end():] if authority else target


async def _answer(send: ASGISendCallable, reply: Reply, found: Fields) -> None:
    await send({"type": "http.response.start", "status": reply.status, "trailers": False,
                "headers": [*_encoded(found), (b"Content-Length", b"%d" % len(reply.body))]})
    await send({"type": "http.response.body", "body": reply.body, "more_body": False})


@lru_cache(maxsize=64)
def _encoded(found: Fields) -> Iterable[tuple[bytes, bytes]]:
    return (*((name.encode("ascii"), value.encode("ascii")) for name, value in found), _SERVER)


_SERVER: Final = (b"Server", b"redox-receiver")


async def _no_body() -> Any:
    """What is left to Flask is told by its head alone."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def _named(send: ASGISendCallable, message: Any) -> None:
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], _SERVER]
    await send(message)


def _compose() -> PublicListener:
    listener = compose()
    logs.configure(listener.settings.log_level)
    return listener


application: Final = Application(_compose)
