"""One stay in a lane, or in some: claimed, run in a handler process, its end recorded, and given back.

May not decide when or whether: workers and requests do. What a handler process could not record because it was ended is
recorded here, under the same lease.
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
from receiver.storage.accept.fan_out import unordered
from receiver.storage.queue import lanes
from receiver.worker.handler_process.ipc import LaneDone, RunLanes, Unsuccessful
from receiver.worker.handler_process.supervisor import HandlerSlot, Killed, LaneReservation, log_attempt
from receiver.worker.leases import Leases

log: Final = structlog.get_logger(__name__)

_left, _cut = point("lane.left"), point("lane.cut")

# Left by a run that was ended because the process stops: it had no fair chance.
_STOPPED: Final = RetryDecision(state="pending", counted=False)


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
    """Run what is pending in the lane for about `leave_after` seconds, under a lease of `lease` seconds.

    `up_to`: run the deliveries that are inline, up to that one. `development`: the destination is one. None: the lane
    was not to be had, or the end of the run is not known. Raises ConfigurationError when the handler cannot be loaded,
    Gone when no process starts, SQLAlchemyError when nothing could be claimed.
    """
    slot.warm()  # first: a lease does not wait for a process
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
    """As `stay`, in those of these ordered lanes of one handler at one destination that are to be had: the first few
    deliveries of each. `others` is called when some were given back unseen, for the handler is slow.
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
                lanes=tuple((fence.lane, fence.epoch) for fence in held.leases),
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
    leases: Leases, held: LaneReservation, cut: Killed, policy: RetryPolicy, handler: str
) -> tuple[LaneDone | None, bool]:
    """Record what the process could not: (how the lane is left, whether its lease is released with it)."""
    if cut.why == "fenced" or not cut.delivery:
        return None, False
    fence = next(fence for fence in held.leases if fence.lane == cut.lane)
    outcome = Outcome(
        kind="timed_out" if cut.why == "timed_out" else "crashed", error_class=cut.error_class, frames=cut.frames
    )
    verdict = (
        _STOPPED
        if cut.why == "stopped"
        else retry_policy.decide(outcome, policy, attempt=cut.attempt, deferred_for=cut.deferred_for)
    )
    try:
        with leases.connection() as connection:
            # Released with it, so that nothing which the process had sent before it ended can be recorded after.
            recorded = lanes.fail(
                connection,
                fence,
                cut.delivery,
                cut.attempt,
                retry_policy.failure_record(outcome, verdict, policy, release=True),
            )
    except SQLAlchemyError as exc:
        # Whoever runs the lane next finds an attempt without an end, and records that.
        log.warning("handler.end_not_recorded", delivery=cut.delivery, error=describe(exc))
        return None, False
    if not recorded:  # it had recorded the end itself, just before
        return LaneDone(why="time"), False
    if cut.why != "stopped":
        log_attempt(
            Unsuccessful(
                lane=fence.lane,
                delivery=cut.delivery,
                attempt=cut.attempt,
                state=verdict.state,
                outcome=outcome.kind,
                error_class=outcome.error_class,
                frames=outcome.frames,
                pause=verdict.pause,
            ),
            handler,
            fence.lane.split("/", 2)[1],
        )
    if verdict.state == "dead":
        return LaneDone(why="dead", error_class=outcome.error_class), True
    return LaneDone(why="waiting" if verdict.pause is None or not policy.unordered else "time"), True
