"""Runtimes: how a coroutine of the endpoints waits. In an event loop it is suspended; in a thread it blocks.

The endpoints are written once, as `async def`, and wait for nothing but what a `Runtime` and a `Transfer` give them.
`EventLoopRuntime` serves them in an event loop. `ThreadRuntime` blocks the thread in which `drive` runs them, under any
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

# The ledger answers within five seconds; should it ever not, the sender is answered all the same.
LEDGER_TIMEOUT: Final = 4.9


class Runtime(Protocol):
    """How a request waits for what another thread does."""

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """What the future holds. Raises what it raises; TimeoutError after so many seconds.

        `flush` is called once the request waits, where its entry may share a batch until then.
        """

    async def run_in_thread(self, call: Callable[[], T]) -> T:
        """What `call` returns. It may take its time, and holds up no other request. Raises what it raises."""


async def recorded(runtime: Runtime, future: Future[T], *, flush: Callable[[], None] | None = None) -> T:
    """What the ledger says, in time; `flush` where it batches. Raises Unavailable."""
    try:
        return await runtime.result(future, LEDGER_TIMEOUT, flush=flush)
    except TimeoutError as exc:
        raise Unavailable("ledger_silent") from exc


class ThreadRuntime:
    """A request that has a thread of its own, which waits."""

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """See Runtime."""
        if flush is not None:
            flush()
        return future.result(seconds)

    async def run_in_thread(self, call: Callable[[], T]) -> T:
        """See Runtime: this thread is the request's."""
        return call()


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in this thread. All that it awaits must be a ThreadRuntime's. Raises what it raises."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
    coroutine.close()
    raise RuntimeError("the coroutine waits for an event loop")


class EventLoopRuntime:
    """Requests in an event loop; what takes its time is done in the threads of `pool`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Executor) -> None:
        self._loop, self._pool = loop, pool
        self._notifier = CompletionNotifier(loop)
        self._flush: dict[Callable[[], None], None] = {}

    async def result(self, future: Future[T], seconds: float, *, flush: Callable[[], None] | None = None) -> T:
        """See Runtime. One flush for all requests that begin to wait in the same turn of the loop."""
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
    """Tells an event loop of futures that complete in another thread: one call into the loop for a whole batch.

    The writer completes a batch at once; `asyncio.wrap_future` would call into the loop for each of its requests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._completed: deque[asyncio.Future[None]] = deque()
        self._notified = False

    async def done(self, future: Future[Any], seconds: float) -> None:
        """Wait until the future is done. Raises TimeoutError after so many seconds."""
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
            # An error: the loop has ended, and no request waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._notified = False  # first: what completes from now on notifies again
        while self._completed:
            waiter = self._completed.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _time_out(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class ConcurrencyLimiter:
    """Limits the request threads that wait for handlers, so that the others are left for feeds. Safe in threads.

    `total` in all; half of them for one key, so that no destination's slow responder takes every thread.
    """

    def __init__(self, total: int) -> None:
        self._total, self._each = total, max(1, total // 2)
        self._taken: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def slot(self, key: Hashable) -> Iterator[None]:
        """A slot while the block runs. Raises Unavailable at once when there is none."""
        with self._lock:
            if self._taken.total() >= self._total or self._taken[key] >= self._each:
                raise Unavailable("responders_busy")
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1
