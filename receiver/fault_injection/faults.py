"""Fail-points: named places in the program where a test can kill, fail or delay the process, or cut its database.

They exist only in a process that starts with RECEIVER_FAILPOINTS in its environment. In any other process each is a
function that does nothing. The variable maps fail-points to actions:

    RECEIVER_FAILPOINTS="ledger.committed=kill@0.02,lane.claimed=delay:0.5#3,outbox.posted=raise"

The actions are `kill` (SIGKILL to the process itself), `raise` (an unexpected error), `delay:SECONDS`, and `cut` (shuts
down every connection of the process to the database). An action runs each time the process passes the fail-point, with
a probability (`@0.02`), or only on one pass (`#3`: the third).

With a production destination in the database the process does not start. The check repeats before each action.

Must not import anything that does I/O except the clock and the log, since web, storage and handlers have fail-points.
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

# Every fail-point, in the order in which a message passes them.
POINTS: Final[Mapping[str, str]] = {
    "request.body_read": "The body is in memory and not yet read.",
    "request.judged": "The verdict is known and not yet acted on.",
    "request.queued": "The message waits for the writer; the request waits for its receipt.",
    "ledger.sending": "A batch is ready and not yet sent to the database.",
    "ledger.claimed": "An open transaction has claimed the keys of a batch with duplicates.",
    "ledger.committing": "A batch with duplicates is written and not yet committed.",
    "ledger.committed": "A batch is committed; no request is notified yet.",
    "ledger.answered": "The requests of a batch are notified; the workers are not.",
    "request.recorded": "The request has its receipt and is not yet answered.",
    "request.answered": "The response was sent.",
    "query.answered": "The responder has answered; the answer is not yet recorded.",
    "query.recorded": "The answer to a query is recorded and not yet sent.",
    "inline.handled": "The inline handlers have succeeded; the request is not yet answered.",
    "lane.claiming": "The worker is about to claim a lane.",
    "lane.claimed": "A lane is claimed; the worker has not yet read the result.",
    "lane.commanded": "A handler process received the command to run a lane.",
    "delivery.started": "The attempt is counted; the handler has not yet started.",
    "handler.ended": "The handler has ended; its timeout is still active.",
    "handler.reported": "The handler's result is reported and not yet recorded.",
    "delivery.committing": "A success is written in the handler's transaction, which is not yet committed.",
    "delivery.succeeded": "A success is committed; the lane's next delivery is not yet read.",
    "delivery.failed": "A failure is committed; the lane's next delivery is not yet read.",
    "lane.killed": "A handler process was killed; that is not yet recorded.",
    "lane.run_ended": "A run of a lane is over; the lane is not yet released.",
    "outbox.begun": "The attempt to send is recorded; nothing is sent yet.",
    "outbox.posted": "Redox has answered; the answer is not yet recorded.",
    "outbox.ended": "The outcome is recorded; the lane's next request is not yet read.",
}

_ACTION: Final = re.compile(
    r"(?P<action>kill|raise|cut|delay:(?P<seconds>\d+(?:\.\d+)?))"
    r"(?:@(?P<chance>\d+(?:\.\d+)?)|#(?P<hit>\d+))?"
)
_SYNTAX: Final = "use kill, raise, cut or delay:SECONDS, optionally followed by @CHANCE or #N"


class FaultTriggered(RuntimeError):
    """The error of the action `raise`. It is not a ReceiverError: the program must not expect it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultAction:
    """An action at a fail-point, with probability `chance` or only on pass number `hit`. `seconds`: the delay."""

    action: str
    seconds: float = 0.0
    chance: float = 1.0
    hit: int | None = None

    def triggers(self, passed: int) -> bool:
        """Return whether the action runs on pass number `passed`, counted from 1."""
        if self.hit is not None:
            return passed == self.hit
        return self.chance >= 1.0 or random.random() < self.chance  # noqa: S311 - not used for security


def parse(text: str) -> dict[str, FaultAction]:
    """Parse the variable: fail-point → action. Raises ConfigurationError that lists every mistake."""
    actions: dict[str, FaultAction] = {}
    mistakes = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, action = (each.strip() for each in part.partition("="))
        found = _ACTION.fullmatch(action)
        if name not in POINTS:
            mistakes.append(f"{name} is not a fail-point")
        elif name in actions:
            mistakes.append(f"{name} is given twice")
        if found is None:
            mistakes.append(f"{part}: {_SYNTAX}")
        elif not 0 < float(found["chance"] or 1) <= 1:
            mistakes.append(f"{part}: the chance must be above 0 and at most 1")
        elif found["hit"] is not None and int(found["hit"]) == 0:
            mistakes.append(f"{part}: the first pass is #1")
        else:
            actions[name] = FaultAction(
                action=found["action"].partition(":")[0],
                seconds=float(found["seconds"] or 0),
                chance=float(found["chance"] or 1),
                hit=None if found["hit"] is None else int(found["hit"]),
            )
    if mistakes:
        raise ConfigurationError("; ".join(mistakes))
    return actions


class FaultRegistry:
    """The actions of this process, after `enable` was called. Thread-safe."""

    def __init__(self) -> None:
        self._actions: Mapping[str, FaultAction] = {}
        self._passed: dict[str, int] = {}
        self._lock = threading.Lock()
        self._production: Callable[[], str | None] = lambda: None
        self._cut: Callable[[], object] = lambda: None

    def enable(self, text: str, *, production: Callable[[], str | None], cut: Callable[[], object]) -> None:
        """Enable the actions in `text`. Raises ConfigurationError.

        `production` returns the name of a production destination, or None. It raises Unavailable while the database
        cannot answer. `cut` shuts down our connections to the database.
        """
        actions = parse(text)
        try:
            found = production()
        except Unavailable:
            found = None  # checked again before each action
        if found is not None:
            raise ConfigurationError(
                f"{VARIABLE} is set, but {found} is a production destination: remove the variable "
                "from the environment, because fault injection can lose messages"
            )
        self._production, self._cut = production, cut
        self._actions = actions
        log.warning("failpoints.enabled", count=len(actions))

    def disable_in_production(self, production: str) -> None:
        """Disable all actions, because the destination `production` exists."""
        if self._actions:
            self._actions = {}
            log.error("failpoints.disabled", destination=production)

    def passing(self, name: str) -> None:
        """Count a pass of the fail-point, and run its action if it is due. Raises FaultTriggered."""
        action = self._actions.get(name)
        if action is None:
            return
        with self._lock:
            passed = self._passed[name] = self._passed.get(name, 0) + 1
        if action.triggers(passed) and self._allowed(name):
            self._trigger(name, action)

    def _allowed(self, name: str) -> bool:
        try:
            found = self._production()
        except Unavailable:
            log.warning("failpoint.skipped", subject=name)
            return False
        if found is not None:
            self.disable_in_production(found)
        return found is None

    def _trigger(self, name: str, action: FaultAction) -> None:
        log.warning("failpoint.triggered", subject=name, action=action.action, pid=os.getpid())
        if action.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action.action == "raise":
            raise FaultTriggered(name)
        elif action.action == "delay":
            time.sleep(action.seconds)
        else:
            self._cut()


_registry: Final = FaultRegistry()
# Read once, at import: a later change of the environment has no effect.
_SET: Final = bool(os.environ.get(VARIABLE))


def point(name: str) -> Callable[[], None]:
    """Return the function to call at the fail-point `name`. Bind it once, at module import. Raises LookupError."""
    if name not in POINTS:
        raise LookupError(name)
    return (lambda: _registry.passing(name)) if _SET else _nothing


def _nothing() -> None:
    """Do nothing: fault injection is off."""


def enable(*, production: Callable[[], str | None], cut: Callable[[], object]) -> None:
    """Enable fault injection if the variable is set: see `FaultRegistry.enable`. Raises ConfigurationError."""
    if text := os.environ.get(VARIABLE):
        _registry.enable(text, production=production, cut=cut)


def disable_in_production(production: Iterable[str]) -> None:
    """Disable fault injection, here and in child processes, if `production` names a destination."""
    for name in production:
        os.environ.pop(VARIABLE, None)
        _registry.disable_in_production(name)
