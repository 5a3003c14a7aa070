"""A request's way as steps: what is to be done is written once, and who does it drives: a thread, or an event loop.

Steps are a generator. It says what it needs next (`Read`, `Wait`, `Call`), is sent what came of it, or has the error
raised where it stands, and returns the outcome. So the doors know nothing of how their waiting is done, and may not
wait by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


@dataclass(slots=True)
class Read:
    """At most `size` bytes of the body; none at its end, or when the sender has gone. Raises BadTransfer."""

    size: int


def _nothing_gathers() -> None:
    """What is waited for is on its way already."""


@dataclass(slots=True)
class Wait:
    """What the future holds. Raises what it raises; TimeoutError after so many seconds.

    `hasten` is called by who begins to wait, where what is waited for may gather with others of its kind until then.
    """

    future: Future[Any]
    seconds: float
    hasten: Callable[[], None] = _nothing_gathers


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


class Walk(Generic[T]):
    """Steps on their way through a request whose body `transfer` gives. Of one thread at a time.

    `outcome` is there when `go` or `finish` says so.
    """

    outcome: T

    def __init__(self, steps: Steps[T], transfer: Transfer) -> None:
        self._steps = steps
        self._transfer = transfer

    def go(self, came: Any = None, failed: Exception | None = None) -> Wait | Call | None:
        """Go on with what came of the last step, up to the next that takes its time; None at the end.

        Reading is taken for what takes none: where it does, it is done here. Raises what the steps raise.
        """
        try:
            while True:
                step = self._steps.send(came) if failed is None else self._steps.throw(failed)
                if not isinstance(step, Read):
                    return step
                came = failed = None
                try:
                    came = self._transfer.read(step.size)
                except Exception as exc:  # noqa: BLE001 - it is theirs who asked for it
                    failed = exc
        except StopIteration as end:
            self.outcome = end.value
            return None

    def finish(self, step: Wait | Call | None) -> T:
        """Take this step and all that follow, in this thread, which waits where there is something to wait for."""
        while step is not None:
            came: Any = None
            failed: Exception | None = None
            try:
                if isinstance(step, Wait):
                    step.hasten()
                    came = step.future.result(step.seconds)
                else:
                    came = step.call()
            except Exception as exc:  # noqa: BLE001 - it is theirs who asked for it
                failed = exc
            step = self.go(came, failed)
        return self.outcome

    def close(self) -> None:
        """Give up what has not ended, and what it holds."""
        self._steps.close()


def take(steps: Steps[T], transfer: Transfer) -> T:
    """Take the steps in this thread. Raises what they raise."""
    walk = Walk(steps, transfer)
    return walk.finish(walk.go())
