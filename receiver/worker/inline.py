"""Inline handlers: run within a request, to answer queries and for `acknowledge="after_handling"`.

Must not depend on HTTP. Each receiver process has a few handler processes of its own for this purpose. They are killed
at their timeouts like a worker's. Workers do not run what is run here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.errors import ConfigurationError, NotFound, ReceiverError, Unavailable
from receiver.pipeline import Receipt
from receiver.protocol.message import ParsedMessage
from receiver.protocol.registry import Destination, Subscription
from receiver.settings import Settings
from receiver.storage.queue import inline_deliveries
from receiver.storage.queue.handler_problems import HandlerProblem, Kind
from receiver.worker.handler_process.bootstrap import init_message, process_name
from receiver.worker.handler_process.child import HandlerProcessGone
from receiver.worker.handler_process.ipc import ResponderAnswer, ResponderError, RunResponder
from receiver.worker.handler_process.supervisor import HandlerSlot, Killed
from receiver.worker.lane_run import run_lane
from receiver.worker.leases import Leases
from receiver.worker.load_failure import PluginError
from receiver.worker.problem_reporter import ProblemReporter, problem_of_failure, summary

log: Final = structlog.get_logger(__name__)

# Seconds. Redox times a query out after 120 seconds in all, including its own time. The limit for notifications is not
# published, so the receiver answers 503 well before any likely limit, and Redox sends the message again.
LONGEST: Final = 100.0
# Bytes of an answer. Redox publishes no limit for it, and accepts messages of 10 MB everywhere.
LARGEST_ANSWER: Final = 10 * 1024 * 1024
# Seconds until a handler process is free or started. A responder's own timeout begins afterwards.
_START_TIMEOUT: Final = 15.0
# Seconds that a request waits for a lane that another request holds.
_BUSY_LANE_TIMEOUT: Final = 5.0
_POLL_INTERVAL: Final = 0.1
# Seconds between attempts to release lanes that could not be released in time. Meanwhile Redox receives 503 for these
# lanes.
_RELEASE_INTERVAL: Final = 1.0
# Seconds. The handler process also enforces its deadline itself, a little later than this side.
_MARGIN: Final = 5.0


class ResponderFailed(ReceiverError):
    """The responder raised an exception, or ended its process."""


class InlineHandlers:
    """The handler processes of one receiver process. Call `start` after fork. Safe in threads."""

    def __init__(self, settings: Settings, url: str, engine: Engine) -> None:
        self._settings = settings
        self._leases = Leases(engine, process_name())
        self._problems = ProblemReporter(self._leases.owner)
        self._slots = [HandlerSlot(lambda: init_message(settings, url)) for _ in range(settings.responders)]
        self._free = list(self._slots)
        # One process is reserved for other destinations, whatever the responders of one destination do.
        self._each = max(1, settings.responders - 1)
        self._taken: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start to renew leases. Handler processes are started when they are first needed."""
        threading.Thread(target=self._keep, name="leases", daemon=True).start()

    def stop(self) -> None:
        """End the handler processes. Their runs are killed, and run again when Redox sends the messages again."""
        self._stopping.set()
        self._leases.leave(time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == len(self._slots), _BUSY_LANE_TIMEOUT)
            for slot in self._free:
                slot.close()
        try:
            self._problems.withdraw(self._leases.connection)
        except SQLAlchemyError as exc:
            log.warning("problems.not_withdrawn", error=describe(exc))

    def no_responder(self, destination: str, message_uuid: str) -> None:
        """Note a query for which no responder is enabled. Does not block."""
        self._problems.add(
            HandlerProblem(kind="responder_missing", handler="", destination=destination, message=UUID(message_uuid))
        )

    def answer(
        self, message: ParsedMessage, responder: Subscription, destination: Destination, receipt: Receipt
    ) -> bytes:
        """Return the answer to a query, as JSON.

        Raises NotFound (the responder is paused, or not installed on this host), Unavailable (no process is free, or
        none starts), TimeoutError, ResponderFailed.
        """
        if responder.paused:
            raise NotFound("the responder is paused: run `redox-receiver handlers resume`")
        deadline = time.monotonic() + min(responder.timeout + _START_TIMEOUT, LONGEST)
        question = RunResponder(
            handler=responder.handler,
            destination=destination.name,
            timeout=responder.timeout,
            until=deadline + _MARGIN,
            largest=LARGEST_ANSWER,
            uuid=receipt.uuid,
            kind=message.kind,
            source_id=message.source_id,
            log_id=message.log_id,
            message_id=message.message_id,
            transmission_id=message.transmission_id,
            facility=message.facility,
            event_time=message.event_time,
            received_at=datetime.now(UTC),
            test=message.test,
            raw=message.raw,
            development=destination.environment == "development",
        )
        with self._slot(destination, deadline) as slot:
            try:
                result = slot.ask(question, deadline)
            except ConfigurationError as exc:
                log.error("responder.not_loaded", responder=responder.handler, error=summary(exc))
                self._add("responder_missing", responder, destination, receipt, exc=exc)
                raise NotFound from exc
            except HandlerProcessGone as exc:
                raise Unavailable("responder_not_started") from exc
        if isinstance(result, ResponderAnswer):
            self._problems.clear(
                responder.handler, destination.name, "responder_missing", "responder_failed", "responder_late"
            )
            return result.body
        late = isinstance(result, Killed) and result.why == "timed_out"
        self._add("responder_late" if late else "responder_failed", responder, destination, receipt, result=result)
        raise TimeoutError if late else ResponderFailed

    def _add(
        self,
        kind: Kind,
        responder: Subscription,
        destination: Destination,
        receipt: Receipt,
        *,
        result: ResponderError | Killed | None = None,
        exc: ConfigurationError | None = None,
    ) -> None:
        """Note why a query was not answered, and log the responder's error."""
        if result is not None:
            shown = result.shown if isinstance(result, ResponderError) else None
            code = result.sqlstate if isinstance(result, ResponderError) else None
            log.error(
                "responder.failed" if kind == "responder_failed" else "responder.late",
                uuid=receipt.uuid,
                responder=responder.handler,
                destination=destination.name,
                error_class=result.error_class,
                frames=list(result.frames),
                sqlstate=code,
                error=shown,
            )
            problem = HandlerProblem(
                kind=kind,
                handler=responder.handler,
                error_class=result.error_class,
                detail=shown,
                place=result.frames[-1] if result.frames else None,
            )
        elif isinstance(exc, PluginError):
            problem = problem_of_failure(exc.failure, kind, responder.handler)
        else:
            problem = HandlerProblem(kind=kind, handler=responder.handler, detail=str(exc))
        self._problems.add(replace(problem, destination=destination.name, message=UUID(receipt.uuid)))

    def run_inline(self, destination: Destination, receipt: Receipt) -> bool:
        """Run the deliveries of `receipt.inline`, after the earlier deliveries of their lanes. Returns True if all are
        done.

        Raises Unavailable (no process is free, none starts, or the database does not answer).
        """
        deadline = time.monotonic() + LONGEST
        try:
            return all(self._run(delivery, destination, deadline) for delivery in receipt.inline)
        except (SQLAlchemyError, HandlerProcessGone) as exc:
            error = describe(exc) if isinstance(exc, SQLAlchemyError) else str(exc)
            log.warning("inline.not_run", uuid=receipt.uuid, error=error)
            raise Unavailable("not_handled_yet") from exc
        except ConfigurationError as exc:
            log.error("inline.handler_not_loaded", uuid=receipt.uuid, error=summary(exc))
            return False

    def _run(self, delivery: int, destination: Destination, deadline: float) -> bool:
        """Return True if the delivery is done. Waits briefly for a lane that another request holds."""
        busy_deadline = min(deadline, time.monotonic() + _BUSY_LANE_TIMEOUT)
        while not self._stopping.is_set():
            with self._leases.connection() as connection:
                found = inline_deliveries.inline_delivery(connection, delivery)
                if found is None or not found[1]:
                    return True  # it has run already, or a worker runs it
                lane = found[0]
                subscription = _after_handling(lane, destination)
                if subscription is None:
                    inline_deliveries.hand_to_workers(connection, lane)
                    return True
                if subscription.paused or inline_deliveries.workers_first(connection, lane, delivery):
                    return False
            with self._slot(destination, deadline) as slot:
                left = run_lane(
                    slot,
                    self._leases,
                    lane,
                    subscription,
                    lease=self._settings.lease,
                    leave_after=deadline - time.monotonic(),
                    up_to=delivery,
                    development=destination.environment == "development",
                )
            if left is not None:
                with self._leases.connection() as connection:
                    found = inline_deliveries.inline_delivery(connection, delivery)
                return found is None or not found[1]
            if time.monotonic() >= busy_deadline:
                return False
            self._stopping.wait(_POLL_INTERVAL)
        return False

    @contextmanager
    def _slot(self, destination: Destination, deadline: float) -> Iterator[HandlerSlot]:
        """Reserve a handler slot for the block. Raises Unavailable if none is free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._slot_allowed(destination), deadline - time.monotonic()):
                raise Unavailable("responders_busy")
            if self._stopping.is_set():
                raise Unavailable("shutting_down")
            slot = self._free.pop()
            self._taken[destination.id] += 1
        try:
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._taken[destination.id] -= 1
                self._changed.notify_all()

    def _slot_allowed(self, destination: Destination) -> bool:
        return self._stopping.is_set() or (bool(self._free) and self._taken[destination.id] < self._each)

    def _keep(self) -> None:
        renew_at = 0.0
        while not self._stopping.wait(min(_RELEASE_INTERVAL, self._settings.lease / 3)):
            self._leases.release()
            try:
                self._problems.flush(self._leases.connection)
            except SQLAlchemyError as exc:
                log.warning("problems.not_reported", error=describe(exc))
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._settings.lease / 3
                self._leases.renew(self._settings.lease)


def _after_handling(lane: str, destination: Destination) -> Subscription | None:
    """Return the subscription that requires this lane to run within the request, or None."""
    handler = lane.split("/", 1)[0]
    return next(
        (
            each
            for each in destination.subscriptions
            if each.handler == handler and each.acknowledge == "after_handling"
        ),
        None,
    )
