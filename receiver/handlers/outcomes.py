"""How a run of a handler ended, and what becomes of its delivery.

May not write it down (receiver.storage.lanes does) and may not keep the exception: only what may be stored of it.
"""

from __future__ import annotations

import random
import re
import traceback
from dataclasses import dataclass, field
from typing import Final, Literal

from receiver.errors import GiveUp, RetryLater
from receiver.storage.lanes import Failure

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
_NOT_NAME: Final = re.compile(r"[^\w.<>:-]")
_LONGEST_NAME: Final = 200
_MOST_FRAMES: Final = 50
_LONGEST_TEXT: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of a run that did not succeed. `text` may quote a patient: it is sealed; the rest may be shown."""

    kind: Kind
    error_class: str
    frames: tuple[str, ...] = ()
    text: str | None = field(default=None, repr=False)
    after: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the subscription says of failures, and how its lane is: `unordered` lanes wait for nothing, and deliveries
    that are run `inline`, within a request, never die: Redox comes again.
    """

    max_attempts: int
    on_failure: Literal["dead", "hold"]
    unordered: bool = False
    inline: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
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
    text = _text(exc)
    if isinstance(exc, RetryLater):
        # A NaN compares with nothing, and falls out as the shortest.
        return Outcome(kind="retry_later", error_class="RetryLater", frames=frames, text=text,
                       after=min(max(_SHORTEST_DEFERRAL, exc.after), LONGEST_DEFERRAL))
    if isinstance(exc, GiveUp):
        code = exc.code if _CODE.fullmatch(str(exc.code)) else "unnamed"
        return Outcome(kind="gave_up", error_class=f"GiveUp:{code}", frames=frames, text=text)
    return Outcome(kind="failed", error_class=_name(type(exc).__name__), frames=frames, text=text)


def judge(outcome: Outcome, policy: Policy, *, attempt: int, deferred_for: float) -> Verdict:
    """What becomes of it. `attempt` is the number of the one that ended; `deferred_for`: seconds since the first
    RetryLater, 0 when there was none."""
    if outcome.kind == "retry_later" and deferred_for < LONGEST_DEFERRAL:
        return Verdict(state="pending", counted=False, deferred=True, pause=None if policy.inline else outcome.after)
    if policy.inline:
        return Verdict(state="pending")
    if outcome.kind == "gave_up" or attempt >= policy.max_attempts:
        return Verdict(state="pending", hold=True) if policy.on_failure == "hold" else Verdict(state="dead")
    return Verdict(state="pending", pause=pause(attempt))


def failure(outcome: Outcome, verdict: Verdict, policy: Policy, *, key: str | None = None,
            sealed: bytes | None = None, release: bool = False) -> Failure:
    """What is to be written down. `sealed`: the outcome's text, sealed under `key`. `release`: the lease ends too."""
    waiting = "waiting" if verdict.pause is not None and not policy.unordered else None
    return Failure(
        outcome=outcome.kind, state=verdict.state, error_class=outcome.error_class, error_frames=outcome.frames,
        error_key=key, error_sealed=sealed, pause=verdict.pause, counted=verdict.counted, deferred=verdict.deferred,
        lane_state="held" if verdict.hold else waiting, release=release)


def pause(attempt: int) -> float:
    """Seconds to wait after that many failed attempts."""
    exact = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 1, 20))
    return exact * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311 - spreads load, keeps no secret


def _frames(exc: BaseException) -> tuple[str, ...]:
    """module:line:function of each frame but our own first ones, outermost first: no source text and no values."""
    places = [(frame.f_globals.get("__name__", "?"), line, frame.f_code.co_name)
              for frame, line in traceback.walk_tb(exc.__traceback__)]
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
