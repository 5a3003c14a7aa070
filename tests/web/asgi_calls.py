"""What tests of the ASGI adapter share: scopes, requests, and an application between startup and shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from msgspec import structs

from receiver.pipeline import Admitted, Receipt, Refused
from receiver.protocol.message import Head, Reply
from receiver.protocol.registry import Registry
from receiver.web.asgi import Application, PublicService
from receiver.web.body import Transfer
from receiver.web.endpoint import LARGE, Endpoint
from receiver.web.runtime import Runtime
from receiver.web.token_endpoint import TokenEndpoint
from receiver.web.wsgi import public_app
from tests.protocol import made_up
from tests.web.test_token_endpoint import Records
from tests.web.test_wsgi import Nobody

Scope = dict[str, Any]
Answer = tuple[int, dict[str, str], bytes]
MODES = ("flask", "asgi")
KNOWN = made_up.registry(made_up.destination(made_up.token()))


class Prompt(Nobody):
    """A ledger that records at once, and remembers the thread of each call."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.refusals: list[Refused] = []

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        self.threads.append(threading.current_thread().name)
        future: Future[Receipt] = Future()
        future.set_result(Receipt(message_id=1, uuid="", outcome="accepted"))
        return future

    def refuse(self, refused: Refused) -> None:
        self.refusals.append(refused)


class Silent(Prompt):
    """A ledger whose futures never complete."""

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        super().accept(admitted, batch=batch)
        return Future()


class Listening(Endpoint):
    """An endpoint that remembers the heads of its requests."""

    def __init__(self) -> None:
        super().__init__(registry=lambda: None, ledger=Nobody(), responders=Nobody(), max_body=100, concurrency=1)
        self.heads: list[Head] = []

    async def serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        self.heads.append(head)
        return Reply(status=200)


def endpoint(ledger: Nobody | None = None, registry: Callable[[], Registry | None] = lambda: KNOWN) -> Endpoint:
    return Endpoint(
        registry=registry, ledger=ledger or Prompt(), responders=Nobody(), max_body=4 * LARGE, concurrency=1
    )


@dataclass
class Listener:
    """An application, and the events of its listener."""

    application: Application
    events: list[str] = field(default_factory=list)


def listener(served: Endpoint, proxies: Sequence[str] = (), mode: str = "asgi") -> Listener:
    events: list[str] = []

    def start() -> PublicService:
        tokens = TokenEndpoint(registry=served.registry, records=Records(), network=str)
        service = PublicService(
            flask=public_app(served, trusted_proxies=proxies, tokens=tokens),
            endpoint=served if mode == "asgi" else None,
            tokens=tokens if mode == "asgi" else None,
            trusted_proxies=proxies,
            now=lambda: datetime.now(UTC),
            threads=2,
            ready=lambda: True,
            stop=lambda: events.append("stopped"),
        )
        events.append("started")
        return service

    return Listener(application=Application(start), events=events)


@asynccontextmanager
async def alive(application: Application) -> AsyncIterator[list[Any]]:
    """The application between its lifespan's startup and shutdown; yields the messages that it sent."""
    to_app: asyncio.Queue[Any] = asyncio.Queue()
    sent: list[Any] = []
    ready = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        ready.set()

    task = asyncio.create_task(application({"type": "lifespan"}, to_app.get, send))
    await to_app.put({"type": "lifespan.startup"})
    await ready.wait()
    yield sent
    await to_app.put({"type": "lifespan.shutdown"})
    await task


async def ask(application: Application, scope: Scope, *messages: Any) -> Answer:
    """The reply to a request whose body is in `messages`."""
    waiting, sent = list(messages), []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await application(scope, receive, send)
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:])


def scope(
    path: str = "/redox/main",
    *,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes = b"",
    **more: Any,
) -> Scope:
    length = [(b"content-length", b"%d" % len(body))] if body else []
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*length, *headers],
        "server": ("127.0.0.1", 80),
        "client": ("192.0.2.2", 9),
        **more,
    }


def request(body: bytes) -> Any:
    return {"type": "http.request", "body": body, "more_body": False}


TOKEN = (b"verification-token", made_up.TOKENS["first"].encode())
GONE = {"type": "http.disconnect"}


async def never() -> Any:
    """A server that sends nothing."""
    await asyncio.Event().wait()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


def served_by(
    served: Endpoint, asked: Scope, *messages: Any, proxies: Sequence[str] = (), mode: str = "asgi"
) -> Answer:
    async def work() -> Any:
        application = listener(served, proxies, mode).application
        async with alive(application):
            return await ask(application, asked, *messages)

    answer: Answer = run(work)
    return answer


def head_of(asked: Scope, proxies: Sequence[str] = ()) -> Head:
    """The head that the endpoint receives, which is the same in both modes."""
    listening = Listening()
    for mode in MODES:
        served_by(listening, asked, proxies=proxies, mode=mode)
    found, same = listening.heads
    assert structs.replace(found, received_at=same.received_at) == same
    return found
