"""Fail-points: named places in the program at which a test can have a process die, fail, dawdle or lose its database.

They are there only in a process in whose environment RECEIVER_FAILPOINTS stood when it began; in any other each is a
function that does nothing. The variable says what happens where:

    RECEIVER_FAILPOINTS="ledger.committed=kill@0.02,lane.claimed=delay:0.5#3,outbox.posted=raise"

`kill` (SIGKILL of the process itself), `raise` (an error that nobody expects), `delay:SECONDS`, or `cut` (every
connection of the process to the database); each time the point is passed, with a chance (`@0.02`), or the one time that
is told (`#3`: the third). Never where a production destination is: such a process does not start, and before each
strike the database is asked. May not import anything that does I/O but the clock and the log: the web, the storage and
the handlers all have points.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from receiver.errors import ConfigurationError, Unavailable

log: Final = structlog.get_logger(__name__)

VARIABLE: Final = "RECEIVER_FAILPOINTS"

# Every point, in the order in which a message passes them.
POINTS: Final[Mapping[str, str]] = {
    "door.body_read": "The body is in memory, and nobody has looked at it.",
    "door.judged": "The verdict is known, and nothing was done about it.",
    "door.queued": "The message waits for the writer, and the request for its receipt.",
    "ledger.sending": "A batch is ready, and nothing of it was sent to the database.",
    "ledger.claimed": "The keys of a batch with repeats are claimed, in a transaction that is open.",
    "ledger.committing": "All of a batch with repeats is written, and not committed.",
    "ledger.committed": "A batch is committed, and nobody was told.",
    "ledger.answered": "Those who wait for a batch were told, and the workers were not.",
    "door.recorded": "The request has its receipt, and nothing was answered.",
    "door.answered": "The answer has left.",
    "query.answered": "The responder has answered, and that is not on record.",
    "query.recorded": "The answer to a query is on record, and has not left.",
    "inline.handled": "What has to succeed within the request has, and nothing was answered.",
    "lane.claiming": "A lane is about to be taken.",
    "lane.claimed": "A lane is taken, and whoever took it does not know yet.",
    "lane.told": "A handler process was told to run a lane.",
    "delivery.started": "The attempt is counted, and the handler has not begun.",
    "handler.ended": "The handler has ended, and whoever keeps its time does not know.",
    "handler.told": "The handler's end is told, and not on record.",
    "delivery.committing": "A success is written beside the handler's work, and neither is committed.",
    "delivery.succeeded": "A success is committed, and the next of the lane was not looked at.",
    "delivery.failed": "A failure is committed, and the next of the lane was not looked at.",
    "lane.cut": "A handler process was ended, and that is not on record.",
    "lane.left": "A run of a lane is over, and the lane not given back.",
    "outbox.begun": "The attempt to send is on record, and nothing was sent.",
    "outbox.posted": "Redox has answered, and that is not on record.",
    "outbox.ended": "How it ended is on record, and the next of the lane was not looked at.",
}

_ORDER: Final = re.compile(
    r"(?P<action>kill|raise|cut|delay:(?P<seconds>\d+(?:\.\d+)?))"
    r"(?:@(?P<chance>\d+(?:\.\d+)?)|#(?P<hit>\d+))?"
)
_HOW: Final = "write kill, raise, cut or delay:SECONDS, with @CHANCE or #N after it if it is not to be each time"


class FaultTriggered(RuntimeError):
    """A fail-point was told to raise. It is none of ours' errors: those are expected, and this must not be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultAction:
    """What happens at a point: each time with a `chance`, or the `hit`-th time alone. `seconds`: of a delay."""

    action: str
    seconds: float = 0.0
    chance: float = 1.0
    hit: int | None = None

    def triggers(self, passed: int) -> bool:
        """Whether it happens when the point is passed for the `passed`-th time."""
        if self.hit is not None:
            return passed == self.hit
        return self.chance >= 1.0 or random.random() < self.chance  # noqa: S311 - nothing is kept secret by it


def parse(text: str) -> dict[str, FaultAction]:
    """What the variable says, by point. Raises ConfigurationError with every mistake."""
    orders: dict[str, FaultAction] = {}
    mistakes = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, order = (each.strip() for each in part.partition("="))
        found = _ORDER.fullmatch(order)
        if name not in POINTS:
            mistakes.append(f"{name} is no fail-point")
        elif name in orders:
            mistakes.append(f"{name} is there twice")
        if found is None:
            mistakes.append(f"{part}: {_HOW}")
        elif not 0 < float(found["chance"] or 1) <= 1:
            mistakes.append(f"{part}: a chance is above 0, and 1 at most")
        elif found["hit"] is not None and int(found["hit"]) == 0:
            mistakes.append(f"{part}: the first time is #1")
        else:
            orders[name] = FaultAction(
                action=found["action"].partition(":")[0],
                seconds=float(found["seconds"] or 0),
                chance=float(found["chance"] or 1),
                hit=None if found["hit"] is None else int(found["hit"]),
            )
    if mistakes:
        raise ConfigurationError("; ".join(mistakes))
    return orders


class FaultRegistry:
    """What is to happen in this process, once `arm` was called. Safe in threads."""

    def __init__(self) -> None:
        self._orders: Mapping[str, FaultAction] = {}
        self._passed: dict[str, int] = {}
        self._lock = threading.Lock()
        self._production: Callable[[], str | None] = lambda: None
        self._cut: Callable[[], object] = lambda: None

    def enable(self, text: str, *, production: Callable[[], str | None], cut: Callable[[], object]) -> None:
        """From now on the points that `text` names strike. Raises ConfigurationError.

        `production` gives the name of a production destination, None when there is none, and raises Unavailable when
        that cannot be known now; `cut` ends our connections to the database.
        """
        orders = parse(text)
        try:
            found = production()
        except Unavailable:
            found = None  # asked again before anything happens
        if found is not None:
            raise ConfigurationError(
                f"{VARIABLE} is set, and {found} is a production destination: take the variable "
                "out of the environment, for fail-points are there to lose messages by"
            )
        self._production, self._cut = production, cut
        self._orders = orders
        log.warning("failpoints.armed", count=len(orders))

    def disable_in_production(self, production: str) -> None:
        """Have no fail-points any more, for there is that production destination."""
        if self._orders:
            self._orders = {}
            log.error("failpoints.disarmed", destination=production)

    def passing(self, name: str) -> None:
        """Strike, if it is this point's turn. Raises Struck."""
        order = self._orders.get(name)
        if order is None:
            return
        with self._lock:
            passed = self._passed[name] = self._passed.get(name, 0) + 1
        if order.triggers(passed) and self._may(name):
            self._trigger(name, order)

    def _may(self, name: str) -> bool:
        try:
            found = self._production()
        except Unavailable:
            log.warning("failpoint.withheld", subject=name)
            return False
        if found is not None:
            self.disable_in_production(found)
        return found is None

    def _trigger(self, name: str, order: FaultAction) -> None:
        log.warning("failpoint.struck", subject=name, action=order.action, pid=os.getpid())
        if order.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order.action == "raise":
            raise FaultTriggered(name)
        elif order.action == "delay":
            time.sleep(order.seconds)
        else:
            self._cut()


_registry: Final = FaultRegistry()
# Of the environment with which the process began: what is bound at import stays so.
_SET: Final = bool(os.environ.get(VARIABLE))


def point(name: str) -> Callable[[], None]:
    """What is called where the point of that name is passed; bound once, when the module that has it is imported."""
    if name not in POINTS:
        raise LookupError(name)
    return (lambda: _registry.passing(name)) if _SET else _nothing


def _nothing() -> None:
    """No fail-point."""


def enable(*, production: Callable[[], str | None], cut: Callable[[], object]) -> None:
    """Arm this process, if the variable is set: see `Armoury.arm`. Raises ConfigurationError."""
    if text := os.environ.get(VARIABLE):
        _registry.enable(text, production=production, cut=cut)


def disable_in_production(production: Iterable[str]) -> None:
    """Have no fail-points any more where a production destination has appeared, nor any process that we start."""
    for name in production:
        os.environ.pop(VARIABLE, None)
        _registry.disable_in_production(name)
