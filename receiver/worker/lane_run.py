"""Lane runs: claims a lane or several, runs them in a handler process, records the end, and releases the leases.

Must not decide when to run a lane: workers and requests do. If a handler process is killed before it can record its
end, the end is recorded here under the same lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver import retry_policy
from receiver.database.engine import describe
from receiver.fault_injection.faults import point
from receiver.protocol.registry import Subscription
from receiver.retry_policy import Outcome, RetryDecision, RetryPolicy
from receiver.states import DeliveryState
from receiver.storage.accept.fan_out import unordered
from receiver.storage.queue import outcomes
from receiver.worker.failure_record import failure_record
from receiver.worker.handler_process.attempt_log import log_attempt
from receiver.worker.handler_process.ipc import LaneDone, RunLanes, Unsuccessful
from receiver.worker.handler_process.reservation import LaneReservation
from receiver.worker.handler_process.supervisor import HandlerSlot, Killed
from receiver.worker.leases import Leases

log: Final = structlog.get_logger(__name__)

_left, _cut = point("lane.run_ended"), point("lane.killed")

# Seconds until a delivery runs again after the process was stopped during its run.
_STOPPED: Final = RetryDecision(state=DeliveryState.PENDING, counted=False)


def run_lane(
    slot: HandlerSlot,
    leases: Leases,
    lane: str,
    subscription: Subscription,
    *,
    lease: float,
    leave_after: float,
    up_to: int | None = None,
    development: bool = False,
) -> LaneDone | None:
    """Run the pending deliveries of a lane for about `leave_after` seconds, under a lease of `lease` seconds.

    `up_to`: run the inline deliveries up to this one. `development`: the destination is a development one. Returns None
    if the lane could not be claimed, or the end of the run is unknown. Raises ConfigurationError if the handler cannot
    be loaded, HandlerProcessGone if no process starts, SQLAlchemyError if the lane could not be claimed.
    """
    slot.warm()  # before the claim: the lease must not wait for a process start
    held = leases.claim(lane, lease, inline=up_to is not None)
    if held is None:
        return None
    return _run(
        slot,
        leases,
        held,
        subscription,
        leave_after=leave_after,
        up_to=up_to,
        slow=lambda _lane: None,
        development=development,
    )


def run_lanes(
    slot: HandlerSlot,
    leases: Leases,
    names: Sequence[str],
    subscription: Subscription,
    *,
    lease: float,
    leave_after: float,
    others: Callable[[], None],
    development: bool = False,
) -> LaneDone | None:
    """Run the first few deliveries of each of these ordered lanes, which belong to one handler at one destination.

    Lanes that cannot be claimed are skipped. `others` is called if some lanes were released without a run because the
    handler is slow. Otherwise as `run_lane`.
    """
    slot.warm()
    held = leases.claim_some(names, lease)
    if held is None:
        return None

    def slow(lane: str) -> None:
        if leases.give_back_after(held, lane):
            others()

    return _run(
        slot, leases, held, subscription, leave_after=leave_after, up_to=None, slow=slow, development=development
    )


def _run(
    slot: HandlerSlot,
    leases: Leases,
    held: LaneReservation,
    subscription: Subscription,
    *,
    leave_after: float,
    up_to: int | None,
    slow: Callable[[str], None],
    development: bool,
) -> LaneDone | None:
    lane = held.lease.lane
    policy = RetryPolicy(
        max_attempts=subscription.max_attempts,
        on_failure=subscription.on_failure,
        unordered=unordered(lane),
        inline=up_to is not None,
    )
    released = None
    try:
        ended = slot.run_lanes(
            RunLanes(
                lanes=tuple((lease.lane, lease.epoch) for lease in held.leases),
                owner=held.lease.owner,
                handler=subscription.handler,
                destination=lane.split("/", 2)[1],
                policy=policy,
                timeout=subscription.timeout,
                until=held.until,
                leave_at=time.monotonic() + leave_after,
                up_to=up_to or 0,
                development=development,
            ),
            held,
            slow,
        )
        if isinstance(ended, LaneDone):
            _left()
            if ended.why == "lost":
                log.warning("lane.lost", lane=lane, error=ended.error_class)
            released = lane if ended.why == "fenced" and len(held.leases) == 1 else None
            return ended
        log.warning(
            "handler.ended",
            handler=subscription.handler,
            lane=ended.lane or lane,
            delivery=ended.delivery,
            attempt=ended.attempt,
            reason=ended.why,
            error_class=ended.error_class,
        )
        _cut()
        left, recorded = _record(leases, held, ended, policy, subscription.handler)
        released = ended.lane if recorded else None
        return left
    finally:
        leases.give_back(held, released=released)


def _record(
    leases: Leases, held: LaneReservation, killed: Killed, policy: RetryPolicy, handler: str
) -> tuple[LaneDone | None, bool]:
    """Record what the killed process could not. Returns why the lane is left, and whether the lease was released with
    it.
    """
    if killed.why == "fenced" or not killed.delivery:
        return None, False
    lease = next(lease for lease in held.leases if lease.lane == killed.lane)
    outcome = Outcome(
        kind="timed_out" if killed.why == "timed_out" else "crashed",
        error_class=killed.error_class,
        frames=killed.frames,
    )
    verdict = (
        _STOPPED
        if killed.why == "stopped"
        else retry_policy.decide(outcome, policy, attempt=killed.attempt, deferred_for=killed.deferred_for)
    )
    try:
        with leases.connection() as connection:
            # Release the lease in the same statement, so that a statement the process had sent earlier cannot be
            # recorded later.
            recorded = outcomes.fail(
                connection,
                lease,
                killed.delivery,
                killed.attempt,
                failure_record(outcome, verdict, policy, release=True),
            )
    except SQLAlchemyError as exc:
        # The next run of the lane finds an attempt without an end, and records it.
        log.warning("handler.end_not_recorded", delivery=killed.delivery, error=describe(exc))
        return None, False
    if not recorded:  # the process had recorded the end just before
        return LaneDone(why="time"), False
    if killed.why != "stopped":
        log_attempt(
            Unsuccessful(
                lane=lease.lane,
                delivery=killed.delivery,
                attempt=killed.attempt,
                state=verdict.state,
                outcome=outcome.kind,
                error_class=outcome.error_class,
                frames=outcome.frames,
                pause=verdict.pause,
            ),
            handler,
            lease.lane.split("/", 2)[1],
        )
    if verdict.state == DeliveryState.DEAD:
        return LaneDone(why="dead", error_class=outcome.error_class), True
    return LaneDone(why="waiting" if verdict.pause is None or not policy.unordered else "time"), True
