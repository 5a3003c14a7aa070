"""Runs handlers, inside a handler process: the deliveries of a lane one after another, and the answers to queries.

May not watch the time: whoever started the process kills it when a handler overruns. Each delivery costs one round trip
to the database: the statement that records its success starts the next.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from receiver import retry_policy
from receiver.database.engine import describe
from receiver.errors import GiveUp, ReceiverError
from receiver.fault_injection.faults import point
from receiver.handlers.context import Context
from receiver.handlers.message import Message
from receiver.keyring import Keyring
from receiver.retry_policy import Outcome, RetryDecision
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import RowMacs
from receiver.storage.queue import lanes
from receiver.storage.queue.connections import OutcomeConnection, PluginConnection, lost
from receiver.storage.queue.lanes import Lease, WaitingDelivery, delivery_binding
from receiver.worker import discovery
from receiver.worker.discovery import Loaded
from receiver.worker.handler_process.ipc import (
    Ended,
    FromChild,
    LaneDone,
    ResponderAnswer,
    ResponderError,
    RunLanes,
    RunResponder,
    Started,
    Unsuccessful,
)
from receiver.worker.handler_process.plugin_log import RUN, RunIds

if TYPE_CHECKING:
    from receiver.worker.handler_process.redox_access import RedoxAccess

_started, _ended, _told = point("delivery.started"), point("handler.ended"), point("handler.told")
_committing, _succeeded, _failed = (point("delivery.committing"), point("delivery.succeeded"), point("delivery.failed"))

# After so many runs the process is replaced, whatever the plugins have leaked.
_RUNS_BEFORE_RECYCLE: Final = 10_000


class InvalidAnswer(ReceiverError):
    """What a responder returned cannot be an answer."""


@dataclass(kw_only=True, slots=True)
class ExecutorState:
    """What a handler process has to work with. `tell` speaks to whoever started it; `leave`: told to leave the lane."""

    keyring: Keyring = field(repr=False)
    url: str = field(repr=False)  # of the database
    records: OutcomeConnection
    work: PluginConnection
    modules: Sequence[str]
    env_file: Path | None
    tell: Callable[[FromChild], None]
    seals: Sealer = field(init=False, repr=False)
    macs: RowMacs = field(init=False, repr=False)
    handlers: dict[str, Loaded] = field(default_factory=dict)
    leave: bool = False
    must_recycle: bool = False
    runs: int = 0
    run: RunIds | None = None  # of the run that goes on
    _speaking: RedoxAccess | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.seals = Sealer(self.keyring)
        self.macs = RowMacs(self.keyring)

    def handler(self, name: str) -> Loaded:
        """The handler of that name, imported when it is first asked for. Raises ConfigurationError."""
        if name not in self.handlers:
            self.handlers[name] = discovery.load_handler(name, self.modules)
        return self.handlers[name]

    def call(self, loaded: Loaded, message: Callable[[], Message], context: Context) -> tuple[Any, Outcome | None]:
        """What the handler returned, and how it ended when not well."""
        here = os.getpid()
        self.runs += 1
        result, outcome = None, None
        try:
            result = loaded.function(message(), context)
            self.work.check()
        except BaseException as exc:  # noqa: BLE001 - whatever a handler does is an outcome, SystemExit included
            if os.getpid() == here:
                outcome = retry_policy.of(exc)
                self.must_recycle |= isinstance(exc, MemoryError)
        if os.getpid() != here:
            os._exit(0)  # the handler forked and both have come back: only one of the two is us
        self.must_recycle |= self.runs >= _RUNS_BEFORE_RECYCLE
        _ended()
        self.tell(Ended())
        _told()
        return result, outcome

    def context(
        self,
        loaded: Loaded,
        destination: str,
        *,
        uuid: str,
        generation: int,
        attempt: int,
        epoch: int,
        delivery: int | None,
        development: bool,
    ) -> Context:
        """What the handler gets with the message."""
        name = loaded.declaration.name
        self.run = RunIds(
            handler=name,
            destination=destination,
            uuid=uuid,
            delivery=delivery,
            attempt=attempt,
            development=development,
        )
        return Context(
            handler=name,
            destination=destination,
            idempotency_key=f"{uuid}:{name}:{generation}",
            attempt=attempt,
            epoch=epoch,
            replayed=generation > 1,
            _connect=self.work.connection,
            _env_file=self.env_file,
            _redox=lambda: self._speaker().redox(name, destination, uuid),
            _outbox=lambda: self._speaker().outbox(name, destination, uuid, self.work.connection),
            log=structlog.get_logger("plugin").bind(**{RUN: self.run}),
        )

    def _speaker(self) -> RedoxAccess:
        if self._speaking is None:
            from receiver.worker.handler_process.redox_access import RedoxAccess

            self._speaking = RedoxAccess(self.url, self.keyring)
        return self._speaking


# The delivery to run next, and the number of its attempt when that is counted already.
_Next = tuple[WaitingDelivery | None, int | None]


class LaneRun:
    """One stay in a lane, or in some one after another, under one lease.

    Of a single lane all is run. Of many the first few of each: what comes after is found again.
    """

    def __init__(self, room: ExecutorState, command: RunLanes) -> None:
        self._room = room
        self._command = command
        self._fences = [Lease(lane=lane, epoch=epoch, owner=command.owner) for lane, epoch in command.lanes]
        self._many = len(self._fences) > 1
        self._fence = self._fences[0]  # of the lane that is run
        self._policy = command.policy
        self._ahead: deque[WaitingDelivery] = deque()  # in that lane
        self._coming: deque[tuple[Lease, deque[WaitingDelivery]]] = deque()  # the lanes after it that have something

    def run(self) -> LaneDone:
        """Run what is there. Raises ConfigurationError when the handler cannot be loaded."""
        loaded = self._room.handler(self._command.handler)
        self._room.work.patience = self._command.timeout
        try:
            return self._run(loaded)
        except SQLAlchemyError as exc:
            # Nobody knows what became of the last statement. The next to run the lane finds out.
            self._room.records.drop()
            self._room.work.drop()
            return LaneDone(why="lost", error_class=describe(exc))

    def _run(self, loaded: Loaded) -> LaneDone:
        if self._many:
            read = lanes.heads(self._room.records.connection, self._fences)
            self._coming.extend((fence, deque(ahead)) for fence, ahead in zip(self._fences, read, strict=True) if ahead)
        then: LaneDone | _Next = self._anew(), None
        while True:
            if isinstance(then, LaneDone):
                # What holds up a lane holds up no other.
                if not self._many or then.why not in ("waiting", "fenced") or self._leaving():
                    return then
                self._ahead.clear()
                then = self._anew(), None
            delivery, attempt = then
            if delivery is None:
                return LaneDone(why="empty")
            then = self._one(loaded, delivery, attempt)

    def _one(self, loaded: Loaded, delivery: WaitingDelivery, attempt: int | None) -> LaneDone | _Next:
        if attempt is None:
            if delivery.lost and (left := self._give_lost(delivery)) is not None:
                return left
            attempt = lanes.start(self._room.records.connection, self._fence, delivery.id)
        if attempt is None:
            # It was skipped meanwhile; or the handler is paused, or the lease another's, and nothing can be read.
            following = self._anew()
            return LaneDone(why="time") if following is not None and following.id == delivery.id else (following, None)
        outcome = self._call(loaded, delivery, attempt)
        then = self._succeed(delivery, attempt) if outcome is None else outcome
        if isinstance(then, Outcome):
            then = self._fail(delivery, attempt, then)
        return then or (self._anew(), None)

    # --- reading

    def _read(self, after: int) -> WaitingDelivery | None:
        """The delivery that comes after `after`; 0 looks at the whole lane anew."""
        if after == 0:
            self._ahead.clear()
        if not self._ahead:
            self._ahead.extend(
                lanes.batch(
                    self._room.records.connection,
                    self._fence,
                    after=after,
                    unordered=self._policy.unordered,
                    inline=self._policy.inline,
                    up_to=self._command.up_to,
                )
            )
        return self._ahead.popleft() if self._ahead else None

    def _anew(self) -> WaitingDelivery | None:
        """The delivery to go on with: in a single lane whatever is first now, for what came before may have been put
        back; of many what was read and is next."""
        if not self._many:
            return self._read(after=0)
        if not self._ahead and self._coming:
            self._fence, self._ahead = self._coming.popleft()
        return self._ahead.popleft() if self._ahead else None

    def _following(self, delivery: WaitingDelivery) -> tuple[Lease, WaitingDelivery | None]:
        """What comes after it, and in which lane; of many it is still to be taken (`_anew`)."""
        if not self._many:
            return self._fence, self._read(after=delivery.id)
        fence, ahead = self._coming[0] if self._coming and not self._ahead else (self._fence, self._ahead)
        return fence, ahead[0] if ahead else None

    # --- one delivery

    def _call(self, loaded: Loaded, delivery: WaitingDelivery, attempt: int) -> Outcome | None:
        self._room.tell(
            Started(lane=self._fence.lane, delivery=delivery.id, attempt=attempt, deferred_for=delivery.deferred_for)
        )
        _started()
        context = self._room.context(
            loaded,
            self._command.destination,
            uuid=str(delivery.uuid),
            generation=delivery.generation,
            attempt=attempt,
            epoch=self._fence.epoch,
            delivery=delivery.id,
            development=self._command.development,
        )
        return self._room.call(loaded, lambda: self._message(delivery), context)[1]

    def _message(self, delivery: WaitingDelivery) -> Message:
        if delivery.sealed is None or delivery.payload_key is None:
            raise GiveUp("payload_purged")
        delivery.prove(self._room.macs)
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
            raw=self._room.seals.open_body(delivery.payload_key, delivery.sealed, payload_binding(uuid)),
        )

    # --- its end

    def _succeed(self, delivery: WaitingDelivery, attempt: int) -> Outcome | LaneDone | _Next | None:
        """An Outcome: the success could not be committed. Otherwise what `_fail` says, or the next, started already."""
        leaving = self._leaving()
        beside, following = (self._fence, None) if leaving else self._following(delivery)
        startable = None if following is None or following.lost else following.id
        work, used = self._room.work, self._room.work.used
        connection = work.connection() if used else self._room.records.connection
        try:
            recorded, started = lanes.succeed(
                connection, self._fence, delivery.id, attempt, following=startable, beside=beside
            )
            if used and recorded:
                _committing()
                work.commit()
        except SQLAlchemyError as exc:
            if not used or lost(exc):
                raise
            # The work does not hold: a deferred constraint, a serialization error, a statement that had failed.
            return retry_policy.of(exc)
        if not recorded:
            work.rollback()
            return LaneDone(why="fenced")
        _succeeded()
        if leaving:
            return LaneDone(why="time", must_recycle=self._room.must_recycle)
        # At its end the lane is looked at from its beginning: what came before may have been put back.
        if following is None:
            return None
        return self._anew() if self._many else following, started

    def _fail(self, delivery: WaitingDelivery, attempt: int, outcome: Outcome) -> LaneDone | None:
        """Why the lane is left; None: the lane is to be looked at anew."""
        self._room.work.rollback()
        verdict = retry_policy.decide(outcome, self._policy, attempt=attempt, deferred_for=delivery.deferred_for)
        left = self._record(delivery, attempt, outcome, verdict)
        if left is None and (self._policy.inline or (verdict.pause is not None and not self._policy.unordered)):
            left = LaneDone(why="waiting", must_recycle=self._room.must_recycle)
        if left is None and self._leaving():
            left = LaneDone(why="time", must_recycle=self._room.must_recycle)
        return left

    def _give_lost(self, delivery: WaitingDelivery) -> LaneDone | None:
        """An attempt of which the end was never recorded: whatever ran it is gone. It counts; nobody waits for it."""
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
            key, sealed = self._room.seals.seal(
                "secret", outcome.text.encode(errors="replace"), delivery_binding(delivery.id)
            )
        if not lanes.fail(
            self._room.records.connection,
            self._fence,
            delivery.id,
            attempt,
            retry_policy.failure_record(outcome, verdict, self._policy, key=key, sealed=sealed),
        ):
            return LaneDone(why="fenced")
        _failed()
        self._room.tell(
            Unsuccessful(
                lane=self._fence.lane,
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
        if verdict.state == "dead":
            return LaneDone(why="dead", error_class=outcome.error_class, must_recycle=self._room.must_recycle)
        return LaneDone(why="waiting", must_recycle=self._room.must_recycle) if verdict.hold else None

    def _leaving(self) -> bool:
        return self._room.leave or self._room.must_recycle or time.monotonic() > self._command.leave_at


def answer(room: ExecutorState, command: RunResponder) -> ResponderAnswer | ResponderError:
    """Have the responder answer. Raises ConfigurationError when it cannot be loaded."""
    loaded = room.handler(command.handler)
    room.work.patience = command.timeout
    message = Message(**{name: getattr(command, name) for name in Message.__dataclass_fields__})
    context = room.context(
        loaded,
        command.destination,
        uuid=command.uuid,
        generation=1,
        attempt=1,
        epoch=0,
        delivery=None,
        development=command.development,
    )
    room.tell(Started())
    body = b""

    def respond(message: Message, context: Context) -> None:
        nonlocal body
        body = _body(loaded.function(message, context), command.largest)
        room.work.check()
        if room.work.used:
            room.work.commit()

    _, outcome = room.call(
        Loaded(declaration=loaded.declaration, function=respond, origin=loaded.origin, development=loaded.development),
        lambda: message,
        context,
    )
    room.work.rollback()
    if outcome is None:
        return ResponderAnswer(body=body, must_recycle=room.must_recycle)
    return ResponderError(
        error_class=outcome.error_class,
        frames=outcome.frames,
        sqlstate=outcome.sqlstate,
        shown=outcome.shown,
        must_recycle=room.must_recycle,
    )


def _body(given: Any, largest: int) -> bytes:
    """What a responder returned, as JSON. Raises InvalidAnswer, whose text never quotes a value."""
    if not isinstance(given, dict):
        hint = ': return model.model_dump(mode="json", by_alias=True)' if hasattr(given, "model_dump") else ""
        kind = "None" if given is None else retry_policy.class_name_of(type(given))
        raise InvalidAnswer(f"a responder returns a dict, not {kind}{hint}")
    if not isinstance(given.get("Meta"), dict):
        raise InvalidAnswer(
            'an answer has a "Meta" with DataModel and EventType, and what the responder returned has none'
        )
    try:
        body = msgspec.json.encode(given)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidAnswer(
            "the answer cannot be written as JSON: use dicts with str keys, lists, str, int, float, bool and None"
        ) from exc
    if len(body) > largest:
        raise InvalidAnswer(f"the answer has {len(body)} bytes, and at most {largest} can be sent")
    return body
