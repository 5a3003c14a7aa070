"""The adapter to ASGI by itself: what it makes of scopes and messages, and in which thread it does what."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import structs

from receiver.errors import BadTransfer, ConfigurationError, Unavailable
from receiver.pipeline import Admitted, Receipt, Refused
from receiver.protocol.message import Head, Reply
from receiver.protocol.registry import Registry
from receiver.web import endpoint as endpoint_module
from receiver.web.asgi import CONNECTION, Application, AsgiTransfer, PublicService, _environ
from receiver.web.body import SMALL, Transfer
from receiver.web.endpoint import LARGE, Endpoint
from receiver.web.runtime import EventLoopRuntime, Runtime
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
    """A ledger that records at once, and remembers in which thread it was asked."""

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
    """A ledger that never says what became of anything."""

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        super().accept(admitted, batch=batch)
        return Future()


class Listening(Endpoint):
    """An endpoint that remembers what it is asked."""

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
    """An application, and what of its listener happened."""

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
    """The application between its lifespan's startup and shutdown; what it said in it."""
    to_app: asyncio.Queue[Any] = asyncio.Queue()
    said: list[Any] = []
    ready = asyncio.Event()

    async def send(message: Any) -> None:
        said.append(message)
        ready.set()

    task = asyncio.create_task(application({"type": "lifespan"}, to_app.get, send))
    await to_app.put({"type": "lifespan.startup"})
    await ready.wait()
    yield said
    await to_app.put({"type": "lifespan.shutdown"})
    await task


async def ask(application: Application, scope: Scope, *messages: Any) -> Answer:
    """The answer to a request whose body is in `messages`."""
    waiting, said = list(messages), []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    await application(scope, receive, send)
    headers = {name.decode().lower(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], headers, b"".join(each.get("body", b"") for each in said[1:])


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
    """A server from which nothing comes."""
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
    """The head that the endpoint is given, which is the same in both modes."""
    listening = Listening()
    for mode in MODES:
        served_by(listening, asked, proxies=proxies, mode=mode)
    found, same = listening.heads
    assert structs.replace(found, received_at=same.received_at) == same
    return found


@pytest.mark.parametrize(
    ("raw", "path", "query", "target"),
    [
        (b"/redox/lab", "/redox/lab", b"", "/redox/lab"),
        (b"//redox/%6cab", "//redox/lab", b"a=%20b&a", "//redox/%6cab"),
        (b"http://u@h:8/redox/lab", "http://u@h:8/redox/lab", b"x?y", "/redox/lab"),
        (None, "/redox/lab", b"", "/redox/lab"),
    ],
)
def test_target(raw: bytes | None, path: str, query: bytes, target: str) -> None:
    """Path and query are what was on the wire, whatever else the server made of it."""
    found = head_of(scope(path, raw_path=raw, query_string=query))
    assert (found.destination, found.target, found.query) == ("lab", target, query.decode())


def test_head() -> None:
    """Header values are those of the wire, one that is sent twice with a comma; who sent it is judged as in Flask."""
    headers = [(b"x-a", b"\xe9"), (b"x-b", b"1"), (b"x-b", b"2"), (b"x-forwarded-for", b"192.0.2.1")]
    found = head_of(scope("/redox/lab", headers=headers, client=("10.0.0.1", 1)), proxies=["10.0.0.0/8"])
    assert found.header("x-a") == b"\xe9"
    assert found.header("x-b") == b"1,2"
    assert (found.peer, found.proxied) == ("192.0.2.1", True)
    found = head_of(scope("/redox/lab", headers=headers, client=("10.0.0.1", 1)))
    assert (found.peer, found.proxied) == ("10.0.0.1", False)
    found = head_of(scope("/redox/lab", client=None))
    assert (found.peer, found.proxied) == ("unknown", True)  # over a Unix socket


@pytest.mark.parametrize(
    ("headers", "length"), [([], 0), ([(b"content-length", b"4")], 4), ([(b"transfer-encoding", b"chunked")], None)]
)
def test_length(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    """A body has a length, or chunks."""
    assert AsgiTransfer(scope(headers=headers), never).length == length


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"-4")],
        [(b"content-length", b"\xb2")],
        [(b"content-length", b"4, 4")],
        [(b"content-length", b"4"), (b"content-length", b"4")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"gzip"), (b"transfer-encoding", b"chunked")],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_length(headers: list[tuple[bytes, bytes]], mode: str) -> None:
    """Of what is neither a length nor chunks nothing is read, should a server let it through."""
    with pytest.raises(BadTransfer):
        _ = AsgiTransfer(scope(headers=headers), never).length
    coded = headers[0][0] == b"transfer-encoding"
    answer = served_by(endpoint(), scope(headers=[*headers, TOKEN]), mode=mode)
    assert (answer[0], answer[1]["connection"]) == (501 if coded else 400, "close")


@pytest.mark.parametrize(("headers", "length"), [([], None), ([(b"content-length", b"4")], 4)])
def test_length_in_http_2(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    """There a body need not be announced: should a server speak it, none is overlooked."""
    transfer = AsgiTransfer(scope(headers=headers, http_version="2"), never)
    assert transfer.length == length


def read(headers: list[tuple[bytes, bytes]], *messages: Any, size: int = 3) -> list[bytes]:
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0)

    async def work() -> list[bytes]:
        transfer = AsgiTransfer(scope(headers=headers), receive)
        pieces = [await transfer.read(size, 5)]
        while pieces[-1]:
            pieces.append(await transfer.read(size, 5))
        return pieces

    found: list[bytes] = run(work)
    return found


def test_pieces() -> None:
    """However the server cuts a body, no more is given than is asked for, and nothing is lost."""
    chunked = [(b"transfer-encoding", b"chunked")]
    assert read(
        chunked,
        {"type": "http.request", "body": b"abcdefgh", "more_body": True},
        {"type": "http.request", "more_body": True},
        request(b"i"),
    ) == [b"abc", b"def", b"gh", b"i", b""]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([(b"transfer-encoding", b"chunked")], GONE),
        ([(b"content-length", b"9")], {"type": "http.unheard-of", "body": b"123456789"}),
    ],
)
def test_malformed(headers: list[tuple[bytes, bytes]], message: Any) -> None:
    """Chunks that end without their end are malformed; so is what the server says in words of its own."""
    with pytest.raises(BadTransfer, match="body_malformed"):
        read(headers, message)


def test_gone() -> None:
    """A sender who goes leaves what he has sent."""
    assert read([(b"content-length", b"9")], {"type": "http.request", "body": b"ab", "more_body": True}, GONE) == [
        b"ab",
        b"",
    ]


def test_too_slow() -> None:
    """What does not come within the seconds that it may take is not waited for."""
    with pytest.raises(BadTransfer, match="body_too_slow"):
        run(lambda: AsgiTransfer(scope(headers=[(b"content-length", b"9")]), never).read(9, 0.01))


@pytest.mark.parametrize("mode", MODES)
def test_answers(mode: str) -> None:
    """A message is accepted, a broken one refused and audited, everything else is Flask's; each answer is ours."""
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
    """Whatever goes wrong in the endpoint or before it is a 503 that closes; so is asking without a lifespan."""

    def fails() -> Registry | None:
        raise ValueError("CANARY")

    status, headers, body = served_by(endpoint(registry=fails), scope())
    assert (status, headers["connection"], body) == (503, "close", b"try again later\n")
    status, headers, _ = served_by(endpoint(), scope(headers=[("text", "not bytes")]))  # type: ignore[list-item]
    assert (status, headers["retry-after"]) == (503, "5")
    assert run(lambda: ask(listener(endpoint()).application, scope()))[0] == 503


def test_a_silent_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the ledger ever not answer, the sender is answered all the same: 503, never 200."""
    monkeypatch.setattr(endpoint_module, "LEDGER_TIMEOUT", 0.05)
    asked = scope(body=made_up.BODY, headers=[TOKEN])
    assert served_by(endpoint(Silent()), asked, request(made_up.BODY))[0] == 503


def test_a_large_body_holds_up_nobody() -> None:
    """What takes long with a large body is done in a thread beside the loop; a small one is not worth one."""
    ledger = Prompt()
    large = made_up.BODY[:-1] + b" " * LARGE + b"}"
    for body in (made_up.BODY, large):
        assert served_by(endpoint(ledger), scope(body=body, headers=[TOKEN]), request(body))[0] == 200
    loop, beside = ledger.threads
    assert loop == threading.main_thread().name
    assert beside.startswith("request")


def test_given_up_by_the_server() -> None:
    """A request that the server gives up leaves nothing behind: its share of the memory is given back."""
    body = made_up.BODY[:-1] + b" " * SMALL + b"}"

    async def work() -> None:
        ledger = Silent()
        served = endpoint(ledger)
        application = listener(served).application
        async with alive(application):
            left = served._memory._left
            asked = asyncio.create_task(ask(application, scope(body=body, headers=[TOKEN]), request(body)))
            for _ in range(10):  # as far as it goes without an answer
                await asyncio.sleep(0)
            assert ledger.threads
            assert served._memory._left == left - (len(body) - SMALL)
            asked.cancel()
            with suppress(asyncio.CancelledError):
                await asked
            assert served._memory._left == left

    run(work)
    gc.collect()  # and no future is left with an error that nobody saw


def test_a_batch_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Futures that end together are told in one call; who gave up waiting is not told, and errors arrive."""

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
        thread.join()  # the loop stands still, as it does while it is busy
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert len(calls) == len(flushed) == 1
        assert outcomes[1:-1] == list(range(1, 99))
        assert isinstance(outcomes[-1], Unavailable)

    run(work)


def test_lifespan() -> None:
    """The parts work from startup to shutdown, and are stopped too when the server ends at once."""
    served = listener(endpoint())

    async def orderly() -> list[Any]:
        async with alive(served.application) as said:
            assert served.events == ["started"]
        return said

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
    ("error", "told"),
    [
        (ConfigurationError("RECEIVER_KEYRING: write another"), "RECEIVER_KEYRING: write another"),
        (ValueError("CANARY"), "ValueError"),
    ],
)
def test_startup_that_fails(error: Exception, told: str) -> None:
    """A mistake of the operator's is told to the server, which says so and does not start; so is a fault of ours."""

    def start() -> PublicService:
        raise error

    async def work() -> list[Any]:
        async with alive(Application(start)) as said:
            pass
        return said

    assert run(work) == [{"type": "lifespan.startup.failed", "message": told}]


def test_no_websockets() -> None:
    """A WebSocket is closed before it is one."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    run(lambda: listener(endpoint()).application({"type": "websocket"}, never, send))
    assert [each["type"] for each in said] == ["websocket.close"]


def test_no_scopes_of_other_kinds() -> None:
    """What is no kind of request that is known here is served by nobody."""
    with pytest.raises(ValueError, match="unheard-of"):
        run(lambda: listener(endpoint()).application({"type": "unheard-of"}, never, never))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_what_the_connection_is_told(mode: str) -> None:
    """The server's connection is told when the head authenticates a request, and when its reply was handed over."""
    told: list[Any] = []

    class Connection:
        def mark_authenticated(self) -> None:
            told.append("authenticated")

        def replied(self, *, refused: bool) -> None:
            told.append(refused)

    for token, status in ((TOKEN, 200), ((b"verification-token", b"wrong"), 401)):
        asked = scope(body=made_up.BODY, headers=[token], state={CONNECTION: Connection()})
        assert served_by(endpoint(), asked, request(made_up.BODY), mode=mode)[0] == status
    assert told == ["authenticated", False, True]


def test_underscores() -> None:
    """In a WSGI environment a header with an underscore could not be told from one with a hyphen: it is dropped."""
    asked = scope(body=made_up.BODY, headers=[(b"verification_token", TOKEN[1])])
    for mode in MODES:
        assert served_by(endpoint(), asked, request(made_up.BODY), mode=mode)[0] == 401
    assert "HTTP_VERIFICATION_TOKEN" not in _environ(asked, "/redox/main")
