"""Runtimes: how a coroutine of an endpoint waits. In an event loop it is suspended; in a thread it blocks.

The endpoints are written once, as `async def`, and await only the methods of a `Runtime` and a `Transfer`.
`EventLoopRuntime` runs them in an event loop. `ThreadRuntime` blocks the thread in which `drive` runs them, under any
WSGI server.

Must not know a framework or a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from receiver.errors import Unavailable

T = TypeVar("T")

# Seconds. The ledger completes within five; if it ever does not, the sender gets a reply all the same.
LEDGER_TIMEOUT: Final = 4.9


class Runtime(Protocol):
    """How a request waits for the work of another thread."""

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """The result of the future. Raises its exception, or TimeoutError after this many seconds.

        `flush` is called when the request begins to wait; until then its entry may share a batch.
        """

    async def run_in_thread(self, call: Callable[[], T]) -> T:
        """The result of `call`, which may block without delaying other requests. Raises its exception."""


async def recorded(runtime: Runtime, future: Future[T], *, flush: Callable[[], None] | None = None) -> T:
    """The result of the ledger, within LEDGER_TIMEOUT. `flush`: see Runtime.result. Raises Unavailable."""
    try:
        return await runtime.result(future, LEDGER_TIMEOUT, flush=flush)
    except TimeoutError as exc:
        raise Unavailable("ledger_silent") from exc


class ThreadRuntime:
    """A request with its own thread, which blocks."""

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """See Runtime."""
        if flush is not None:
            flush()
        return future.result(seconds)

    async def run_in_thread(self, call: Callable[[], T]) -> T:
        """See Runtime: the request has this thread to itself."""
        return call()


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in this thread. It may await a ThreadRuntime only. Raises its exception."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
    coroutine.close()
    raise RuntimeError("the coroutine waits for an event loop")


class EventLoopRuntime:
    """Requests in an event loop. The threads of `pool` run what blocks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Executor) -> None:
        self._loop, self._pool = loop, pool
        self._notifier = CompletionNotifier(loop)
        self._flush: dict[Callable[[], None], None] = {}

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """See Runtime. Requests that begin to wait in the same iteration of the loop share one flush."""
        if flush is not None:
            if not self._flush:
                self._loop.call_soon(self._flush_all)
            self._flush[flush] = None
        await self._notifier.done(future, seconds)
        return future.result(0)

    async def run_in_thread(self, call: Callable[[], T]) -> T:
        """See Runtime."""
        return await self._loop.run_in_executor(self._pool, call)

    def _flush_all(self) -> None:
        while self._flush:
            self._flush.popitem()[0]()


class CompletionNotifier:
    """Wakes an event loop when futures complete in another thread, with one call into the loop for a whole batch.

    The ledger's thread completes a batch at once; `asyncio.wrap_future` would make a call for each request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._completed: deque[asyncio.Future[None]] = deque()
        self._notified = False

    async def done(self, future: Future[Any], seconds: float) -> None:
        """Wait until the future is done. Raises TimeoutError after this many seconds."""
        waiter = self._loop.create_future()
        future.add_done_callback(partial(self._notify, waiter))
        late = self._loop.call_later(seconds, _time_out, waiter)
        try:
            await waiter
        finally:
            late.cancel()

    def _notify(self, waiter: asyncio.Future[None], _completed: Future[Any]) -> None:
        self._completed.append(waiter)
        if not self._notified:
            self._notified = True
            # RuntimeError: the loop is closed, and no request waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._notified = False  # first: a future that completes after this notifies again
        while self._completed:
            waiter = self._completed.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _time_out(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class ConcurrencyLimiter:
    """Limits how many request threads wait for handlers, and keeps the others free for feeds. Safe in threads.

    At most `total`, and half of them for one key, so that one destination's slow responder cannot take all threads.
    """

    def __init__(self, total: int) -> None:
        self._total, self._each = total, max(1, total // 2)
        self._taken: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def slot(self, key: Hashable) -> Iterator[None]:
        """Hold a slot while the block runs. Raises Unavailable at once if none is free."""
        with self._lock:
            if self._taken.total() >= self._total or self._taken[key] >= self._each:
                raise Unavailable("responders_busy")
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1
