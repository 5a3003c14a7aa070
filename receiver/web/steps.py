"""A request's way as steps: what is to be done is written once, and who does it drives: a thread, or an event loop.

Steps are a generator. It says what it needs next (`Read`, `Wait`, `Call`), is sent what came of it, or has the error
raised where it stands, and returns the outcome. So the doors know nothing of how their waiting is done, and may not
wait by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


@dataclass(slots=True)
class Read:
    """At most `size` bytes of the body; none at its end, or when the sender has gone. Raises BadTransfer."""

    size: int


@dataclass(slots=True)
class Wait:
    """What the future holds. Raises what it raises; TimeoutError after so many seconds."""

    future: Future[Any]
    seconds: float


@dataclass(slots=True)
class Call:
    """What `call` returns. It may take its time, and must not hold up others. Raises what it raises."""

    call: Callable[[], Any]


T = TypeVar("T")
Steps = Generator[Read | Wait | Call, Any, T]


class Transfer(Protocol):
    """The body of a request that is on its way.

    `length`: what Content-Length announces; None where the body comes in chunks. A request without a body has length 0.
    `read` returns at most `size` bytes, and none at the end, or when the sender has gone; it raises BadTransfer where
    the chunks are none.
    """

    @property
    def length(self) -> int | None: ...
    def read(self, size: int) -> bytes: ...


def take(steps: Steps[T], transfer: Transfer) -> T:
    """Take the steps in this thread, which waits where there is something to wait for. Raises what they raise."""
    came: Any = None
    failed: Exception | None = None
    try:
        while True:
            step = steps.send(came) if failed is None else steps.throw(failed)
            came = failed = None
            try:
                if isinstance(step, Read):
                    came = transfer.read(step.size)
                elif isinstance(step, Wait):
                    came = step.future.result(step.seconds)
                else:
                    came = step.call()
            except Exception as exc:  # noqa: BLE001 - it is theirs who asked for it
                failed = exc
    except StopIteration as end:
        outcome: T = end.value
        return outcome
