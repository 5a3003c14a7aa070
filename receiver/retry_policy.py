"""Retry policy: the outcome of a failed run, and the decision when the delivery runs again.

Must not store the decision (receiver.storage.queue.outcomes does). Must not keep the exception, only the parts that may
be stored.
"""

from __future__ import annotations

import random
import re
import sys
import traceback
from dataclasses import dataclass, field
from typing import Final, Literal

from receiver.errors import GiveUp, ReceiverError, RetryLater, WorkAborted
from receiver.states import DeliveryState

Kind = Literal["failed", "timed_out", "crashed", "retry_later", "gave_up"]

# Seconds. The pause after a failed attempt doubles each time, up to the longest. The random spread prevents deliveries
# that failed together from running again at the same time.
FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 600.0
SPREAD: Final = 0.25
# Seconds that a handler may defer a delivery; after that, RetryLater is a failed attempt.
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
    """The outcome of a run that did not succeed. `text` may quote a patient and is sealed. The other fields may be
    shown.

    `shown`: the text again, if the receiver itself wrote it. It names settings and commands, never a patient.
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
    """How the subscription treats failures.

    `unordered`: the lane does not wait for a failed delivery. `inline`: the delivery runs within a request and is never
    dead, because Redox sends it again.
    """

    max_attempts: int
    on_failure: Literal["dead", "hold"]
    unordered: bool = False
    inline: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryDecision:
    """What happens to a delivery that did not succeed. `pause`: seconds until it may run again, None for at once.

    `counted`: it counts as an attempt. `hold`: the lane is blocked until an operator releases it.
    """

    state: Literal[DeliveryState.PENDING, DeliveryState.DEAD]
    pause: float | None = None
    counted: bool = True
    deferred: bool = False
    hold: bool = False


def outcome_of(exc: BaseException) -> Outcome:
    """Return the outcome for an exception of a handler."""
    frames = _frames(exc)
    text, shown = _text(exc), _shown(exc)
    if isinstance(exc, RetryLater):
        # Every comparison with NaN is false, so it results in the shortest deferral.
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
    """Return the class name of an exception, or of the nearest base class that source code defines under its name.

    The name of a dynamic class can contain data: type(f"No bed for {name}", …).
    """
    return class_name_of(type(exc))


def class_name_of(given: type) -> str:
    """As `class_name`, for any class. Returns "object" if source code defines none of its bases."""
    for kind in given.__mro__:
        name, qualified = kind.__name__, kind.__qualname__
        if not _CLASS.fullmatch(name):
            continue
        found: object = sys.modules.get(kind.__module__)
        for part in qualified.split("."):
            found = getattr(found, part, None)
        # A class inside a function cannot be looked up. The qualified name of a dynamic class contains no "<locals>".
        if found is kind or qualified.endswith(f".<locals>.{name}"):
            return name
    return "object"


def _retryable(exc: BaseException) -> bool:
    """Return True for a retryable error of receiver.outbound. Not imported here, because few handlers use it."""
    errors = sys.modules.get("receiver.outbound.errors")
    return errors is not None and isinstance(exc, errors.OutboundError) and bool(exc.retryable)


def _sqlstate(exc: BaseException) -> str | None:
    """Return the SQLSTATE of the exception, or of its cause. SQLAlchemy's errors hold the driver's as `orig`."""
    cause: BaseException | None = exc
    while cause is not None:
        code = getattr(cause, "sqlstate", None) or getattr(getattr(cause, "orig", None), "sqlstate", None)
        if isinstance(code, str):
            return code
        cause = cause.__cause__
    return None


def _shown(exc: BaseException) -> str | None:
    """Return the text of an error that the receiver raised, which names a setting or a rule of the plugin API."""
    raised = None
    for frame, _ in traceback.walk_tb(exc.__traceback__):
        raised = str(frame.f_globals.get("__name__", ""))
    ours = raised is not None and raised.partition(".")[0] == "receiver"
    is_shown = isinstance(exc, ReceiverError) and not isinstance(exc, RetryLater | GiveUp)
    return str(exc) if ours and is_shown else None


def decide(outcome: Outcome, policy: RetryPolicy, *, attempt: int, deferred_for: float) -> RetryDecision:
    """Decide what happens to the delivery.

    `attempt`: the number of the attempt that ended. `deferred_for`: seconds since the first RetryLater, or 0.
    """
    if outcome.kind == "retry_later" and deferred_for < LONGEST_DEFERRAL:
        return RetryDecision(
            state=DeliveryState.PENDING, counted=False, deferred=True, pause=None if policy.inline else outcome.after
        )
    if policy.inline:
        return RetryDecision(state=DeliveryState.PENDING)
    if outcome.kind == "gave_up" or attempt >= policy.max_attempts:
        return (
            RetryDecision(state=DeliveryState.PENDING, hold=True)
            if policy.on_failure == "hold"
            else RetryDecision(state=DeliveryState.DEAD)
        )
    return RetryDecision(state=DeliveryState.PENDING, pause=pause(attempt))


def pause(attempt: int) -> float:
    """Return the seconds to wait after this number of failed attempts."""
    exact = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 1, 20))
    return exact * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311 - spreads load, not a secret


def _frames(exc: BaseException) -> tuple[str, ...]:
    """Return module:line:function of each frame, outermost first, without the receiver's own first frames.

    Contains no source text and no values.
    """
    places = [
        (frame.f_globals.get("__name__", "?"), line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(exc.__traceback__)
    ]
    while places and str(places[0][0]).startswith("receiver.worker."):
        places.pop(0)
    return tuple(f"{_name(str(module))}:{line}:{_name(name)}" for module, line, name in places[-_MOST_FRAMES:])


def _name(text: str) -> str:
    return _NOT_NAME.sub("?", text)[:_LONGEST_NAME]


def _text(exc: BaseException) -> str:
    try:
        return str(exc)[:_LONGEST_TEXT]
    except Exception as second:  # noqa: BLE001 - the plugin's own code makes the text
        return f"(its text is not available: {type(second).__name__})"
