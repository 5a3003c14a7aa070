"""The ASGI adapter without a server: its replies, its threads and its lifespan."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from receiver.errors import ConfigurationError, Unavailable
from receiver.protocol.registry import Registry
from receiver.web import runtime as runtime_module
from receiver.web.asgi import Application, PublicService
from receiver.web.asgi_request import CONNECTION
from receiver.web.body import SMALL
from receiver.web.endpoint import LARGE
from receiver.web.runtime import EventLoopRuntime
from tests.protocol import made_up
from tests.web.asgi_calls import (
    GONE,
    MODES,
    TOKEN,
    Prompt,
    Silent,
    alive,
    ask,
    endpoint,
    listener,
    never,
    request,
    run,
    scope,
    served_by,
)


@pytest.mark.parametrize("mode", MODES)
def test_answers(mode: str) -> None:
    """A message is accepted, an incomplete one is refused and audited, and Flask serves all other paths."""
    ledger = Prompt()
    whole = scope(body=made_up.BODY, headers=[TOKEN])
    status, headers, body = served_by(endpoint(ledger), whole, request(made_up.BODY), mode=mode)
    assert (status, body, headers["content-length"]) == (200, b"", "0")
    assert {"x-content-type-options": "nosniff", "cache-control": "no-store", "server": "redox-receiver"}.items() <= (
        headers.items()
    )
    assert "connection" not in headers
    status, headers, _ = served_by(endpoint(ledger), scope(body=made_up.BODY, headers=[TOKEN]), GONE, mode=mode)
    assert status == 400
    assert [each.reason for each in ledger.refusals] == ["body_incomplete"]
    status, headers, body = served_by(endpoint(), scope("/nowhere"), mode=mode)
    assert (status, headers["server"], body) == (404, "redox-receiver", b"not found\n")
    assert served_by(endpoint(), scope("http://h/livez", method="GET"), mode=mode)[0] == 200
    assert served_by(endpoint(), scope(method="PUT"), mode=mode)[1]["allow"] == "GET, POST"
    status, headers, _ = served_by(endpoint(), scope("/oauth/nobody/token"), mode=mode)
    assert (status, headers["pragma"], headers["www-authenticate"]) == (401, "no-cache", 'Basic realm="oauth"')


def test_faults_are_not_the_messages() -> None:
    """An error in the endpoint or before it is a 503 that closes; so is a request without a lifespan."""

    def fails() -> Registry | None:
        raise ValueError("CANARY")

    status, headers, body = served_by(endpoint(registry=fails), scope())
    assert (status, headers["connection"], body) == (503, "close", b"try again later\n")
    status, headers, _ = served_by(endpoint(), scope(headers=[("text", "not bytes")]))  # type: ignore[list-item]
    assert (status, headers["retry-after"]) == (503, "5")
    assert run(lambda: ask(listener(endpoint()).application, scope()))[0] == 503


def test_a_silent_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the ledger never completes, the sender gets 503, not 200."""
    monkeypatch.setattr(runtime_module, "LEDGER_TIMEOUT", 0.05)
    asked = scope(body=made_up.BODY, headers=[TOKEN])
    assert served_by(endpoint(Silent()), asked, request(made_up.BODY))[0] == 503


def test_a_large_body_delays_no_other_request() -> None:
    """A large body is judged in a thread, a small one in the event loop."""
    ledger = Prompt()
    large = made_up.BODY[:-1] + b" " * LARGE + b"}"
    for body in (made_up.BODY, large):
        assert served_by(endpoint(ledger), scope(body=body, headers=[TOKEN]), request(body))[0] == 200
    loop, pool = ledger.threads
    assert loop == threading.main_thread().name
    assert pool.startswith("request")


def test_given_up_by_the_server() -> None:
    """A request that the server cancels returns its part of the memory budget."""
    body = made_up.BODY[:-1] + b" " * SMALL + b"}"

    async def work() -> None:
        ledger = Silent()
        served = endpoint(ledger)
        application = listener(served).application
        async with alive(application):
            left = served._memory._left
            asked = asyncio.create_task(ask(application, scope(body=body, headers=[TOKEN]), request(body)))
            for _ in range(10):  # until it waits for the ledger
                await asyncio.sleep(0)
            assert ledger.threads
            assert served._memory._left == left - (len(body) - SMALL)
            asked.cancel()
            with suppress(asyncio.CancelledError):
                await asked
            assert served._memory._left == left

    run(work)
    gc.collect()  # and no future is left with an error that was never retrieved


def test_a_batch_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Futures that complete together wake the loop once. A cancelled waiter is skipped, and errors arrive."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Any] = []
        threadsafe = loop.call_soon_threadsafe

        def counted(call: Any) -> None:
            calls.append(call)
            threadsafe(call)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        runtime = EventLoopRuntime(loop, ThreadPoolExecutor(1))
        flushed: list[None] = []

        def flush() -> None:
            flushed.append(None)

        futures: list[Future[int]] = [Future() for _ in range(100)]
        waiting = [asyncio.create_task(runtime.result(each, 60, flush=flush)) for each in futures]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)

        def end() -> None:
            for number, each in enumerate(futures[:-1]):
                each.set_result(number)
            futures[-1].set_exception(Unavailable("queue_full"))

        thread = threading.Thread(target=end)
        thread.start()
        thread.join()  # the loop does not run, as while it is busy
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert len(calls) == len(flushed) == 1
        assert outcomes[1:-1] == list(range(1, 99))
        assert isinstance(outcomes[-1], Unavailable)

    run(work)


def test_lifespan() -> None:
    """The service runs from startup to shutdown, and is stopped too when the server cancels the lifespan."""
    served = listener(endpoint())

    async def orderly() -> list[Any]:
        async with alive(served.application) as sent:
            assert served.events == ["started"]
        return sent

    assert [each["type"] for each in run(orderly)] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert served.events == ["started", "stopped"]

    async def at_once() -> None:
        ready, never = asyncio.Event(), asyncio.Event()
        waiting: list[Any] = [{"type": "lifespan.startup"}]

        async def receive() -> Any:
            if not waiting:
                await never.wait()
            return waiting.pop()

        async def send(message: Any) -> None:
            ready.set()

        task = asyncio.create_task(served.application({"type": "lifespan"}, receive, send))
        await ready.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(at_once)
    assert served.events == 2 * ["started", "stopped"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigurationError("RECEIVER_KEYRING: write another"), "RECEIVER_KEYRING: write another"),
        (ValueError("CANARY"), "ValueError"),
    ],
)
def test_startup_that_fails(error: Exception, message: str) -> None:
    """A failed start is reported to the server: a configuration error with its text, any other with its class."""

    def start() -> PublicService:
        raise error

    async def work() -> list[Any]:
        async with alive(Application(start)) as sent:
            pass
        return sent

    assert run(work) == [{"type": "lifespan.startup.failed", "message": message}]


def test_no_websockets() -> None:
    """A WebSocket handshake is refused."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    run(lambda: listener(endpoint()).application({"type": "websocket"}, never, send))
    assert [each["type"] for each in sent] == ["websocket.close"]


def test_no_scopes_of_other_kinds() -> None:
    """A scope of an unknown type raises ValueError."""
    with pytest.raises(ValueError, match="unheard-of"):
        run(lambda: listener(endpoint()).application({"type": "unheard-of"}, never, never))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_events_of_the_connection(mode: str) -> None:
    """The server's connection is notified when the head authenticates a request, and when its reply was sent."""
    events: list[Any] = []

    class Connection:
        def mark_authenticated(self) -> None:
            events.append("authenticated")

        def replied(self, *, refused: bool) -> None:
            events.append(refused)

    for token, status in ((TOKEN, 200), ((b"verification-token", b"wrong"), 401)):
        asked = scope(body=made_up.BODY, headers=[token], state={CONNECTION: Connection()})
        assert served_by(endpoint(), asked, request(made_up.BODY), mode=mode)[0] == status
    assert events == ["authenticated", False, True]
