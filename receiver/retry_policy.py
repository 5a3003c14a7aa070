"""How a run of a handler ended, and what becomes of its delivery.

Must not write it down (receiver.storage.queue.lanes does), and must not keep the exception: only what may be stored of it.
"""

from __future__ import annotations

import random
import re
import sys
import traceback
from dataclasses import dataclass, field
from typing import Final, Literal

from receiver.database.engine import sqlstate
from receiver.errors import GiveUp, ReceiverError, RetryLater
from receiver.storage.queue.connections import WorkAborted
from receiver.storage.queue.lanes import DeliveryFailure

Kind = Literal["failed", "timed_out", "crashed", "retry_later", "gave_up"]

# The pause after a failed attempt: doubled each time, up to the longest, and spread so that what failed together does
# not come back together.
FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 600.0
SPREAD: Final = 0.25
# How long a handler may put a delivery off before that is a failed attempt too.
LONGEST_DEFERRAL: Final = 72 * 3600.0
_SHORTEST_DEFERRAL: Final = 0.05

_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NOT_NAME: Final = re.compile(r"[^\w.<>:-]", re.ASCII)
_CLASS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
_LONGEST_NAME: Final = 200
_MOST_FRAMES: Final = 50
_LONGEST_TEXT: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of a run that did not succeed. `text` may quote a patient: it is sealed; the rest may be shown.

    `shown`: the text again, where the receiver itself wrote it: it names settings and commands, never a patient.
    """

    kind: Kind
    error_class: str
    frames: tuple[str, ...] = ()
    text: str | None = field(default=None, repr=False)
    after: float = 0.0
    sqlstate: str | None = None
    shown: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """What the subscription says of failures, and how its lane is: `unordered` lanes wait for nothing, and deliveries
    that are run `inline`, within a request, never die: Redox comes again.
    """

    max_attempts: int
    on_failure: Literal["dead", "hold"]
    unordered: bool = False
    inline: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryDecision:
    """What becomes of a delivery that did not succeed. `pause`: seconds until it may run again, None for at once.

    `counted`: whether it used up an attempt. `hold`: the lane stands still until an operator releases it.
    """

    state: Literal["pending", "dead"]
    pause: float | None = None
    counted: bool = True
    deferred: bool = False
    hold: bool = False


def of(exc: BaseException) -> Outcome:
    """The outcome of a handler that raised."""
    frames = _frames(exc)
    text, shown = _text(exc), _shown(exc)
    if isinstance(exc, RetryLater):
        # A NaN compares with nothing, and falls out as the shortest.
        return Outcome(
            kind="retry_later",
            error_class="RetryLater",
            frames=frames,
            text=text,
            after=min(max(_SHORTEST_DEFERRAL, exc.after), LONGEST_DEFERRAL),
        )
    if isinstance(exc, GiveUp):
        code = exc.code if _CODE.fullmatch(str(exc.code)) else "unnamed"
        return Outcome(kind="gave_up", error_class=f"GiveUp:{code}", frames=frames, text=text)
    if _retryable(exc):
        after = getattr(exc, "retry_after", None) or RetryLater().after
        return Outcome(
            kind="retry_later",
            error_class=class_name(exc),
            frames=frames,
            text=text,
            after=min(max(_SHORTEST_DEFERRAL, after), LONGEST_DEFERRAL),
            shown=shown,
        )
    if isinstance(exc, WorkAborted):
        frames = tuple(map(_name, exc.frames)) or frames
    return Outcome(
        kind="failed", error_class=class_name(exc), frames=frames, text=text, sqlstate=_sqlstate(exc), shown=shown
    )


def class_name(exc: BaseException) -> str:
    """The name of an exception's class, or the nearest base that stands in code under its name.

    A class that is made while the program runs can have a name that is made of data: type(f"No bed for {name}", …).
    """
    return class_name_of(type(exc))


def class_name_of(given: type) -> str:
    """As `class_name`, of any class; "object" where none of its bases stands in code."""
    for kind in given.__mro__:
        name, qualified = kind.__name__, kind.__qualname__
        if not _CLASS.fullmatch(name):
            continue
        found: object = sys.modules.get(kind.__module__)
        for part in qualified.split("."):
            found = getattr(found, part, None)
        # A class inside a function cannot be looked up; `type(name, …)` says nothing of a function.
        if found is kind or qualified.endswith(f".<locals>.{name}"):
            return name
    return "object"


def _retryable(exc: BaseException) -> bool:
    """An error of receiver.outbound after which the same call may succeed; not imported here, for few handlers call."""
    errors = sys.modules.get("receiver.outbound.errors")
    return errors is not None and isinstance(exc, errors.OutboundError) and bool(exc.retryable)


def _sqlstate(exc: BaseException) -> str | None:
    """Of the exception, or of the one that it was raised from."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(code := getattr(cause, "sqlstate", None) or sqlstate(cause), str):
        cause = cause.__cause__
    return None if cause is None else code


def _shown(exc: BaseException) -> str | None:
    """The text of an error that the receiver raised to name a setting or a rule of the contract."""
    raised = None
    for frame, _ in traceback.walk_tb(exc.__traceback__):
        raised = str(frame.f_globals.get("__name__", ""))
    ours = raised is not None and raised.partition(".")[0] == "receiver"
    told = isinstance(exc, ReceiverError) and not isinstance(exc, RetryLater | GiveUp)
    return str(exc) if ours and told else None


def decide(outcome: Outcome, policy: RetryPolicy, *, attempt: int, deferred_for: float) -> RetryDecision:
    """What becomes of it. `attempt` is the number of the one that ended; `deferred_for`: seconds since the first
    RetryLater, 0 when there was none."""
    if outcome.kind == "retry_later" and deferred_for < LONGEST_DEFERRAL:
        return RetryDecision(
            state="pending", counted=False, deferred=True, pause=None if policy.inline else outcome.after
        )
    if policy.inline:
        return RetryDecision(state="pending")
    if outcome.kind == "gave_up" or attempt >= policy.max_attempts:
        return RetryDecision(state="pending", hold=True) if policy.on_failure == "hold" else RetryDecision(state="dead")
    return RetryDecision(state="pending", pause=pause(attempt))


def failure_record(
    outcome: Outcome,
    verdict: RetryDecision,
    policy: RetryPolicy,
    *,
    key: str | None = None,
    sealed: bytes | None = None,
    release: bool = False,
) -> DeliveryFailure:
    """What is to be written down. `sealed`: the outcome's text, sealed under `key`. `release`: the lease ends too."""
    waiting = "waiting" if verdict.pause is not None and not policy.unordered else None
    return DeliveryFailure(
        outcome=outcome.kind,
        state=verdict.state,
        error_class=outcome.error_class,
        error_frames=outcome.frames,
        error_key=key,
        error_sealed=sealed,
        error_shown=outcome.shown,
        pause=verdict.pause,
        counted=verdict.counted,
        deferred=verdict.deferred,
        lane_state="held" if verdict.hold else waiting,
        release=release,
    )


def pause(attempt: int) -> float:
    """Seconds to wait after that many failed attempts."""
    exact = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 1, 20))
    return exact * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311 - spreads load, keeps no secret


def _frames(exc: BaseException) -> tuple[str, ...]:
    """module:line:function of each frame but our own first ones, outermost first: no source text and no values."""
    places = [
        (frame.f_globals.get("__name__", "?"), line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(exc.__traceback__)
    ]
    while places and str(places[0][0]).startswith("receiver.handlers."):
        places.pop(0)
    return tuple(f"{_name(str(module))}:{line}:{_name(name)}" for module, line, name in places[-_MOST_FRAMES:])


def _name(text: str) -> str:
    return _NOT_NAME.sub("?", text)[:_LONGEST_NAME]


def _text(exc: BaseException) -> str:
    try:
        return str(exc)[:_LONGEST_TEXT]
    except Exception as second:  # noqa: BLE001 - it is the plugin's own code that makes the text
        return f"(its text cannot be made: {type(second).__name__})"
