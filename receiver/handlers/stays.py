"""One stay in a lane: claimed, run in a handler process, its end recorded, and given back.

May not decide when or whether: workers and requests do. What a handler process could not record because it was ended is
recorded here, under the same lease.
"""

from __future__ import annotations

import time
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver.handlers import outcomes
from receiver.handlers.leases import Leases
from receiver.handlers.outcomes import Outcome, Policy, Verdict
from receiver.handlers.runner import Cut, Lease, Slot
from receiver.handlers.wire import Left, RunLane
from receiver.protocol.registry import Subscription
from receiver.storage import lanes
from receiver.storage.database import describe
from receiver.storage.dispatch import unordered

log: Final = structlog.get_logger(__name__)

# Left by a run that was ended because the process stops: it had no fair chance.
_STOPPED: Final = Verdict(state="pending", counted=False)


def stay(slot: Slot, leases: Leases, lane: str, subscription: Subscription, *, lease: float, leave_after: float,
         up_to: int | None = None) -> Left | None:
    """Run what is pending in the lane for about `leave_after` seconds, under a lease of `lease` seconds.

    `up_to`: run the deliveries that are inline, up to that one. None: the lane was not to be had, or the end of the run
    is not known. Raises ConfigurationError when the handler cannot be loaded, Gone when no process starts,
    SQLAlchemyError when nothing could be claimed.
    """
    slot.warm()  # first: a lease does not wait for a process
    held = leases.claim(lane, lease, inline=up_to is not None)
    if held is None:
        return None
    policy = Policy(max_attempts=subscription.max_attempts, on_failure=subscription.on_failure,
                    unordered=unordered(lane), inline=up_to is not None)
    released = False
    try:
        ended = slot.run_lane(RunLane(
            lane=lane, epoch=held.fence.epoch, owner=held.fence.owner, handler=subscription.handler,
            destination=lane.split("/", 2)[1], policy=policy, timeout=subscription.timeout, until=held.until,
            leave_at=time.monotonic() + leave_after, up_to=up_to or 0), held)
        if isinstance(ended, Left):
            if ended.why == "lost":
                log.warning("lane.lost", lane=lane, error=ended.error_class)
            released = ended.why == "fenced"
            return ended
        log.warning("handler.ended", handler=subscription.handler, lane=lane, delivery=ended.delivery,
                    attempt=ended.attempt, reason=ended.why, error_class=ended.error_class)
        left, released = _record(leases, held, ended, policy)
        return left
    finally:
        leases.give_back(held, released=released)


def _record(leases: Leases, held: Lease, cut: Cut, policy: Policy) -> tuple[Left | None, bool]:
    """Record what the process could not: (how the lane is left, whether the lease is released with it)."""
    if cut.why == "fenced" or not cut.delivery:
        return None, False
    outcome = Outcome(kind="timed_out" if cut.why == "timed_out" else "crashed", error_class=cut.error_class)
    verdict = _STOPPED if cut.why == "stopped" else outcomes.judge(
        outcome, policy, attempt=cut.attempt, deferred_for=cut.deferred_for)
    try:
        with leases.connection() as connection:
            # Released with it, so that nothing which the process had sent before it ended can be recorded after.
            recorded = lanes.fail(connection, held.fence, cut.delivery, cut.attempt,
                                  outcomes.failure(outcome, verdict, policy, release=True))
    except SQLAlchemyError as exc:
        # Whoever runs the lane next finds an attempt without an end, and records that.
        log.warning("handler.end_not_recorded", delivery=cut.delivery, error=describe(exc))
        return None, False
    if not recorded:  # it had recorded the end itself, just before
        return Left(why="time"), False
    if verdict.state == "dead":
        return Left(why="dead", error_class=outcome.error_class), True
    return Left(why="waiting" if verdict.pause is None or not policy.unordered else "time"), True

