"""Handlers within a request: the answers to queries, and what must have succeeded before Redox is told 200.

May not know HTTP. A receiver process has its own few handler processes for this, which are killed as a worker's are; no
worker runs what is run here.
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
from receiver.storage.queue import lanes
from receiver.storage.queue.handler_problems import HandlerProblem, Kind
from receiver.worker.discovery import PluginError
from receiver.worker.handler_process.bootstrap import init_message, process_name
from receiver.worker.handler_process.ipc import ResponderAnswer, ResponderError, RunResponder
from receiver.worker.handler_process.supervisor import HandlerProcessGone, HandlerSlot, Killed
from receiver.worker.lane_run import run_lane
from receiver.worker.leases import Leases
from receiver.worker.problem_reporter import ProblemReporter, of_failure, summary

log: Final = structlog.get_logger(__name__)

# Redox gives up on a query after 120 seconds in all, its own time included. How long it waits for the answer to a
# notification is not published: it is told 503 well before anybody gives up, and comes again.
LONGEST: Final = 100.0
# Bytes of an answer; Redox publishes no limit, and takes messages of 10 MB everywhere.
LARGEST_ANSWER: Final = 10 * 1024 * 1024
# What may pass before a responder's own time begins: until a process is free, or has started.
_BEFOREHAND: Final = 15.0
# How long a request waits for a lane that another request holds.
_BUSY: Final = 5.0
_POLL_INTERVAL: Final = 0.1
# How often lanes are given back that could not be when it was time: Redox is told 503 as long as nobody has them.
_RELEASE: Final = 1.0
# A process keeps its time by itself too, a little later than we do.
_MARGIN: Final = 5.0


class ResponderFailed(ReceiverError):
    """The responder raised, or ended its process."""


class InlineHandlers:
    """The handler processes of one receiver process. `start` only after fork; safe in threads, a request each."""

    def __init__(self, settings: Settings, url: str, engine: Engine) -> None:
        self._settings = settings
        self._leases = Leases(engine, process_name())
        self._problems = ProblemReporter(self._leases.owner)
        self._slots = [HandlerSlot(lambda: init_message(settings, url)) for _ in range(settings.responders)]
        self._free = list(self._slots)
        # One is left for the others, whatever a destination's responders do.
        self._each = max(1, settings.responders - 1)
        self._taken: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to keep leases. Handler processes are started when they are first needed."""
        threading.Thread(target=self._keep, name="leases", daemon=True).start()

    def stop(self) -> None:
        """End the handler processes. What they run is ended, and runs again when Redox sends it again."""
        self._stopping.set()
        self._leases.leave(time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == len(self._slots), _BUSY)
            for slot in self._free:
                slot.close()
        try:
            self._problems.withdraw(self._leases.connection)
        except SQLAlchemyError as exc:
            log.warning("problems.not_withdrawn", error=describe(exc))

    def no_responder(self, destination: str, message_uuid: str) -> None:
        """A query came that no responder is enabled for. Does not wait."""
        self._problems.add(
            HandlerProblem(kind="responder_missing", handler="", destination=destination, message=UUID(message_uuid))
        )

    def answer(
        self, message: ParsedMessage, responder: Subscription, destination: Destination, receipt: Receipt
    ) -> bytes:
        """The answer to a query, as JSON.

        Raises NotFound (the responder is paused, or not on this host), Unavailable (no process is free, or none
        starts), TimeoutError, ResponderFailed.
        """
        if responder.paused:
            raise NotFound("the responder is paused: run `redox-receiver handlers resume`")
        deadline = time.monotonic() + min(responder.timeout + _BEFOREHAND, LONGEST)
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
                said = slot.ask(question, deadline)
            except ConfigurationError as exc:
                log.error("responder.not_loaded", responder=responder.handler, error=summary(exc))
                self._add("responder_missing", responder, destination, receipt, exc=exc)
                raise NotFound from exc
            except HandlerProcessGone as exc:
                raise Unavailable("responder_not_started") from exc
        if isinstance(said, ResponderAnswer):
            self._problems.clear(
                responder.handler, destination.name, "responder_missing", "responder_failed", "responder_late"
            )
            return said.body
        late = isinstance(said, Killed) and said.why == "timed_out"
        self._add("responder_late" if late else "responder_failed", responder, destination, receipt, said=said)
        raise TimeoutError if late else ResponderFailed

    def _add(
        self,
        kind: Kind,
        responder: Subscription,
        destination: Destination,
        receipt: Receipt,
        *,
        said: ResponderError | Killed | None = None,
        exc: ConfigurationError | None = None,
    ) -> None:
        """Remember why a query was not answered, and log what the responder did."""
        if said is not None:
            shown = said.shown if isinstance(said, ResponderError) else None
            code = said.sqlstate if isinstance(said, ResponderError) else None
            log.error(
                "responder.failed" if kind == "responder_failed" else "responder.late",
                uuid=receipt.uuid,
                responder=responder.handler,
                destination=destination.name,
                error_class=said.error_class,
                frames=list(said.frames),
                sqlstate=code,
                error=shown,
            )
            problem = HandlerProblem(
                kind=kind,
                handler=responder.handler,
                error_class=said.error_class,
                detail=shown,
                place=said.frames[-1] if said.frames else None,
            )
        elif isinstance(exc, PluginError):
            problem = of_failure(exc.failure, kind, responder.handler)
        else:
            problem = HandlerProblem(kind=kind, handler=responder.handler, detail=str(exc))
        self._problems.add(replace(problem, destination=destination.name, message=UUID(receipt.uuid)))

    def run_inline(self, destination: Destination, receipt: Receipt) -> bool:
        """Run the deliveries of `receipt.inline`, and what is pending before them; whether they are done.

        Raises Unavailable (no process is free, or none starts; the database does not answer).
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
        """Whether the delivery is done. A lane that another request holds is waited for a little."""
        patience = min(deadline, time.monotonic() + _BUSY)
        while not self._stopping.is_set():
            with self._leases.connection() as connection:
                found = lanes.inline_delivery(connection, delivery)
                if found is None or not found[1]:
                    return True  # it has run, or is the workers' now
                lane = found[0]
                subscription = _after_handling(lane, destination)
                if subscription is None:
                    lanes.hand_to_workers(connection, lane)
                    return True
                if subscription.paused or lanes.workers_first(connection, lane, delivery):
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
                    found = lanes.inline_delivery(connection, delivery)
                return found is None or not found[1]
            if time.monotonic() >= patience:
                return False
            self._stopping.wait(_POLL_INTERVAL)
        return False

    @contextmanager
    def _slot(self, destination: Destination, deadline: float) -> Iterator[HandlerSlot]:
        """A process's place while the block runs. Raises Unavailable when none is free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._may_take(destination), deadline - time.monotonic()):
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

    def _may_take(self, destination: Destination) -> bool:
        return self._stopping.is_set() or (bool(self._free) and self._taken[destination.id] < self._each)

    def _keep(self) -> None:
        renew_at = 0.0
        while not self._stopping.wait(min(_RELEASE, self._settings.lease / 3)):
            self._leases.release()
            try:
                self._problems.flush(self._leases.connection)
            except SQLAlchemyError as exc:
                log.warning("problems.not_reported", error=describe(exc))
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._settings.lease / 3
                self._leases.renew(self._settings.lease)


def _after_handling(lane: str, destination: Destination) -> Subscription | None:
    """The subscription that wants this lane run within the request; None when none does any more."""
    handler = lane.split("/", 1)[0]
    return next(
        (
            each
            for each in destination.subscriptions
            if each.handler == handler and each.acknowledge == "after_handling"
        ),
        None,
    )
