"""The lane executor: runs the deliveries of a lane in order, inside a handler process, and records their outcomes.

Each delivery costs one round trip to the database: the statement that records its success starts the next delivery.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from receiver import retry_policy
from receiver.database.engine import describe
from receiver.errors import GiveUp
from receiver.fault_injection.faults import point
from receiver.handlers.message import Message
from receiver.retry_policy import Outcome, RetryDecision
from receiver.states import DeliveryState
from receiver.storage.evidence.encryption import payload_binding
from receiver.storage.queue import outcomes, waiting_deliveries
from receiver.storage.queue.connections import lost
from receiver.storage.queue.leases import Lease
from receiver.storage.queue.outcomes import delivery_binding
from receiver.storage.queue.waiting_deliveries import WaitingDelivery
from receiver.worker.discovery import LoadedHandler
from receiver.worker.failure_record import failure_record
from receiver.worker.handler_process.executor import ExecutorState
from receiver.worker.handler_process.ipc import LaneDone, RunLanes, Started, Unsuccessful

_started = point("delivery.started")
_committing, _succeeded, _failed = point("delivery.committing"), point("delivery.succeeded"), point("delivery.failed")

# The delivery to run next, and the number of its attempt if the attempt is already recorded.
_Next = tuple[WaitingDelivery | None, int | None]


class LaneExecutor:
    """One run of a lane, or of several lanes in order, under one lease.

    A single lane is run until it is empty. Of several lanes only the first few deliveries of each are run; the rest
    stay due.
    """

    def __init__(self, state: ExecutorState, command: RunLanes) -> None:
        self._state = state
        self._command = command
        self._leases = [Lease(lane=lane, epoch=epoch, owner=command.owner) for lane, epoch in command.lanes]
        self._many = len(self._leases) > 1
        self._lease = self._leases[0]  # of the current lane
        self._policy = command.policy
        self._ahead: deque[WaitingDelivery] = deque()  # in the current lane
        self._later_lanes: deque[tuple[Lease, deque[WaitingDelivery]]] = deque()  # later lanes that have deliveries
        self._called_at = 0.0  # monotonic
        self._succeeded: list[float] = []  # run times, in seconds

    def run(self) -> LaneDone:
        """Run the deliveries. Raises ConfigurationError if the handler cannot be loaded."""
        loaded = self._state.handler(self._command.handler)
        self._state.work.timeout = self._command.timeout
        try:
            done = self._run(loaded)
        except SQLAlchemyError as exc:
            # The result of the last statement is unknown. The next run of the lane resolves it.
            self._state.records.drop()
            self._state.work.drop()
            done = LaneDone(why="lost", error_class=describe(exc))
        return msgspec.structs.replace(done, succeeded=tuple(self._succeeded))

    def _run(self, loaded: LoadedHandler) -> LaneDone:
        if self._many:
            read = waiting_deliveries.heads(self._state.records.connection, self._leases)
            self._later_lanes.extend(
                (lease, deque(ahead)) for lease, ahead in zip(self._leases, read, strict=True) if ahead
            )
        then: LaneDone | _Next = self._next_delivery(), None
        while True:
            if isinstance(then, LaneDone):
                # A blocked lane must not block the other lanes.
                if not self._many or then.why not in ("waiting", "fenced") or self._leaving():
                    return then
                self._ahead.clear()
                then = self._next_delivery(), None
            delivery, attempt = then
            if delivery is None:
                return LaneDone(why="empty")
            then = self._run_delivery(loaded, delivery, attempt)

    def _run_delivery(self, loaded: LoadedHandler, delivery: WaitingDelivery, attempt: int | None) -> LaneDone | _Next:
        if attempt is None:
            if delivery.lost and (left := self._fail_lost(delivery)) is not None:
                return left
            attempt = outcomes.start(self._state.records.connection, self._lease, delivery.id)
        if attempt is None:
            # The delivery was skipped, the handler is paused, or another process holds the lease: there is nothing to
            # read.
            following = self._next_delivery()
            return LaneDone(why="time") if following is not None and following.id == delivery.id else (following, None)
        outcome = self._call(loaded, delivery, attempt)
        then = self._succeed(delivery, attempt) if outcome is None else outcome
        if isinstance(then, Outcome):
            then = self._fail(delivery, attempt, then)
        return then or (self._next_delivery(), None)

    # --- Reading

    def _read(self, after: int) -> WaitingDelivery | None:
        """Return the delivery after `after`. 0 reads the lane again from its start."""
        if after == 0:
            self._ahead.clear()
        if not self._ahead:
            self._ahead.extend(
                waiting_deliveries.batch(
                    self._state.records.connection,
                    self._lease,
                    after=after,
                    unordered=self._policy.unordered,
                    inline=self._policy.inline,
                    up_to=self._command.up_to,
                )
            )
        return self._ahead.popleft() if self._ahead else None

    def _next_delivery(self) -> WaitingDelivery | None:
        """Return the delivery to continue with.

        In a single lane this is the first one now, because an operator may have put earlier deliveries back. Of several
        lanes it is the next one already read.
        """
        if not self._many:
            return self._read(after=0)
        if not self._ahead and self._later_lanes:
            self._lease, self._ahead = self._later_lanes.popleft()
        return self._ahead.popleft() if self._ahead else None

    def _peek_next(self, delivery: WaitingDelivery) -> tuple[Lease, WaitingDelivery | None]:
        """Return the next delivery and its lane. Of several lanes, the delivery is not removed from the queue (see
        `_next_delivery`).
        """
        if not self._many:
            return self._lease, self._read(after=delivery.id)
        lease, ahead = self._later_lanes[0] if self._later_lanes and not self._ahead else (self._lease, self._ahead)
        return lease, ahead[0] if ahead else None

    # --- One delivery

    def _call(self, loaded: LoadedHandler, delivery: WaitingDelivery, attempt: int) -> Outcome | None:
        self._state.send(
            Started(lane=self._lease.lane, delivery=delivery.id, attempt=attempt, deferred_for=delivery.deferred_for)
        )
        _started()
        self._called_at = time.monotonic()
        context = self._state.context(
            loaded,
            self._command.destination,
            uuid=str(delivery.uuid),
            generation=delivery.generation,
            attempt=attempt,
            epoch=self._lease.epoch,
            delivery=delivery.id,
            development=self._command.development,
        )
        return self._state.call(loaded, lambda: self._message(delivery), context)[1]

    def _message(self, delivery: WaitingDelivery) -> Message:
        if delivery.sealed is None or delivery.payload_key is None:
            raise GiveUp("payload_purged")
        delivery.prove(self._state.macs)
        uuid = str(delivery.uuid)
        return Message(
            uuid=uuid,
            kind=delivery.kind,
            source_id=delivery.source_id,
            log_id=delivery.log_id,
            message_id=delivery.message_id,
            transmission_id=delivery.transmission_id,
            facility=delivery.facility,
            event_time=delivery.event_time,
            received_at=delivery.received_at,
            test=delivery.test,
            raw=self._state.seals.open_body(delivery.payload_key, delivery.sealed, payload_binding(uuid)),
        )

    # --- Outcomes

    def _succeed(self, delivery: WaitingDelivery, attempt: int) -> Outcome | LaneDone | _Next | None:
        """Record the success. Returns an Outcome if it could not be committed, else the result of `_fail` or the next
        delivery, already started.
        """
        seconds = time.monotonic() - self._called_at
        leaving = self._leaving()
        next_lease, following = (self._lease, None) if leaving else self._peek_next(delivery)
        startable = None if following is None or following.lost else following.id
        work, used = self._state.work, self._state.work.used
        connection = work.connection() if used else self._state.records.connection
        try:
            recorded, started = outcomes.succeed(
                connection, self._lease, delivery.id, attempt, following=startable, next_lease=next_lease
            )
            if used and recorded:
                _committing()
                work.commit()
        except SQLAlchemyError as exc:
            if not used or lost(exc):
                raise
            # The transaction cannot commit: a deferred constraint, a serialization error, or a statement that failed
            # earlier.
            return retry_policy.outcome_of(exc)
        if not recorded:
            work.rollback()
            return LaneDone(why="fenced")
        _succeeded()
        self._succeeded.append(seconds)
        if leaving:
            return LaneDone(why="time", must_recycle=self._state.must_recycle)
        # At its end, read the lane from its start: an operator may have put earlier deliveries back.
        if following is None:
            return None
        return self._next_delivery() if self._many else following, started

    def _fail(self, delivery: WaitingDelivery, attempt: int, outcome: Outcome) -> LaneDone | None:
        """Record the failure. Returns why the lane is left, or None to read the lane again."""
        self._state.work.rollback()
        verdict = retry_policy.decide(outcome, self._policy, attempt=attempt, deferred_for=delivery.deferred_for)
        left = self._record(delivery, attempt, outcome, verdict)
        if left is None and (self._policy.inline or (verdict.pause is not None and not self._policy.unordered)):
            left = LaneDone(why="waiting", must_recycle=self._state.must_recycle)
        if left is None and self._leaving():
            left = LaneDone(why="time", must_recycle=self._state.must_recycle)
        return left

    def _fail_lost(self, delivery: WaitingDelivery) -> LaneDone | None:
        """Record an attempt without an end: the process that ran it is gone. The attempt counts, without a pause."""
        outcome = Outcome(kind="crashed", error_class="WorkerLost")
        verdict = retry_policy.decide(
            outcome, self._policy, attempt=delivery.attempts, deferred_for=delivery.deferred_for
        )
        return self._record(delivery, delivery.attempts, outcome, replace(verdict, pause=None))

    def _record(
        self, delivery: WaitingDelivery, attempt: int, outcome: Outcome, verdict: RetryDecision
    ) -> LaneDone | None:
        key, sealed = None, None
        if outcome.text is not None:
            key, sealed = self._state.seals.seal(
                "payload", outcome.text.encode(errors="replace"), delivery_binding(delivery.id)
            )
        if not outcomes.fail(
            self._state.records.connection,
            self._lease,
            delivery.id,
            attempt,
            failure_record(outcome, verdict, self._policy, key=key, sealed=sealed),
        ):
            return LaneDone(why="fenced")
        _failed()
        self._state.send(
            Unsuccessful(
                lane=self._lease.lane,
                delivery=delivery.id,
                attempt=attempt,
                state=verdict.state,
                outcome=outcome.kind,
                error_class=outcome.error_class,
                frames=outcome.frames,
                sqlstate=outcome.sqlstate,
                shown=outcome.shown,
                pause=verdict.pause,
            )
        )
        if verdict.state == DeliveryState.DEAD:
            return LaneDone(why="dead", error_class=outcome.error_class, must_recycle=self._state.must_recycle)
        return LaneDone(why="waiting", must_recycle=self._state.must_recycle) if verdict.hold else None

    def _leaving(self) -> bool:
        return self._state.leave or self._state.must_recycle or time.monotonic() > self._command.leave_at
