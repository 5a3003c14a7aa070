"""The record of a failed attempt: what is stored of its outcome, and of the decision about its delivery."""

from __future__ import annotations

from receiver.retry_policy import Outcome, RetryDecision, RetryPolicy
from receiver.states import LaneState
from receiver.storage.queue.outcomes import DeliveryFailure


def failure_record(
    outcome: Outcome,
    verdict: RetryDecision,
    policy: RetryPolicy,
    *,
    key: str | None = None,
    sealed: bytes | None = None,
    release: bool = False,
) -> DeliveryFailure:
    """Return the record to store. `sealed`: the outcome's text, sealed under `key`. `release`: release the lease."""
    waiting = LaneState.WAITING if verdict.pause is not None and not policy.unordered else None
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
        lane_state=LaneState.HELD if verdict.hold else waiting,
        release=release,
    )
