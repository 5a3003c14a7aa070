"""Ledger, lanes and corrections in any order of events, compared with a model of what they promise.

Hypothesis makes up what happens: messages and repeats of them come, workers claim, begin, end, vanish and come back too
late, operators hold, retry, skip, replay and pause. After each step the rows are what the model says.

HYPOTHESIS_EXAMPLES=500 tries more of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import verify
from receiver.storage.operations.corrections.delivery_corrections import DeliveryCorrections
from receiver.storage.operations.corrections.lane_corrections import LaneCorrections
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.queries import DeliveryFilter, MessageFilter
from receiver.storage.queue import leases, outcomes, waiting_deliveries
from receiver.storage.queue.leases import Lease
from receiver.storage.queue.outcomes import DeliveryFailure
from receiver.storage.registry.changes import RegistryChanges
from tests.storage.door import DESTINATION, SOURCE, Door, body, handler
from tests.support.postgres import drop_database, new_database

# The same ones each time, unless more are asked for.
EXAMPLES: Final = int(os.environ.get("HYPOTHESIS_EXAMPLES", "12"))
AGAIN: Final = "HYPOTHESIS_EXAMPLES" not in os.environ
HANDLERS: Final = ("register", "tell")
WORKERS: Final = ("one", "two")
WHY: Final = "found out by trying"

nth: Final = st.integers(0, 99)


@dataclass
class Delivery:
    """A row of `deliveries`, as it must be. `begun`: the number of an attempt whose end is not recorded."""

    id: int
    message: int
    handler: str
    generation: int = 1
    state: str = "pending"
    attempts: int = 0
    begun: bool = False
    epoch: int | None = None


@dataclass
class Lane:
    """A row of `lanes`, as it must be. `due`: the time that it waits for has come."""

    name: str
    state: str = "ready"
    due: bool = False
    epoch: int = 0
    owner: str | None = None
    leased: bool = False
    paused: bool = False


@dataclass
class Arrived:
    """A message: what it was, and what became of it."""

    id: int
    content: bytes
    test: bool
    state: str


class Promised(RuleBasedStateMachine):
    """One destination, one source, two handlers with a lane each, two workers and an operator."""

    def __init__(self, template: str, keyring: Keyring) -> None:
        super().__init__()
        self.url = new_database(template)
        self.engine = open_engine(self.url)
        self.keyring = keyring
        self.registration = RegistryChanges(self.engine, keyring, actor="tester@test")
        self.door = Door(self.engine, keyring, self.registration).build()
        for name in HANDLERS:
            self.door.enable(handler(name))
        self.ledger = MessageLedger(self.engine, keyring, quarantine_quota=10**9)
        self.ledger.start()
        self.delivery_corrections = DeliveryCorrections(self.engine, keyring, actor="alice@ops1")
        self.lane_corrections = LaneCorrections(self.engine, keyring, actor="alice@ops1")
        self.message_corrections = MessageCorrections(self.engine, keyring, actor="alice@ops1")
        self.connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

        self.tests_accepted = False
        self.messages: list[Arrived] = []
        self.deliveries: list[Delivery] = []
        self.lanes = {name: Lane(f"{name}/{DESTINATION}/source:{SOURCE}") for name in HANDLERS}
        self.fences: list[tuple[str, Lease]] = []
        self.running: list[tuple[str, Lease, int, int]] = []  # handler, fence, delivery, attempt

    def teardown(self) -> None:
        self.ledger.stop()
        try:
            with self.engine.connect() as connection:
                assert verify.verify(connection, self.keyring, payloads=True).first_bad is None
        finally:
            self.connection.close()
            self.engine.dispose()
            drop_database(self.url)

    # --- what the model knows

    def pending(self, name: str) -> list[Delivery]:
        """What waits in a lane, in its order."""
        return sorted(
            (each for each in self.deliveries if each.handler == name and each.state == "pending"),
            key=lambda each: each.id,
        )

    def current(self, name: str, fence: Lease) -> bool:
        """Whether the lease stands: nobody has claimed the lane after it, and it was not given back."""
        lane = self.lanes[name]
        return lane.epoch == fence.epoch and lane.owner == fence.owner

    def _arrives(self, content: bytes) -> str:
        admitted = self.door.admit(content)
        receipt = self.ledger.accept(admitted).result(30)
        self.latest = receipt.message_id
        return receipt.outcome

    def _add(self, message: int, handlers: Iterable[str] = HANDLERS) -> None:
        rows = self.door.rows(
            "SELECT id, handler, generation FROM deliveries WHERE message_id = :m AND id > :last ORDER BY id",
            m=message,
            last=max((each.id for each in self.deliveries), default=0),
        )
        assert sorted(row.handler for row in rows) == sorted(handlers)
        for row in rows:
            before = [
                each.generation for each in self.deliveries if (each.message, each.handler) == (message, row.handler)
            ]
            assert row.generation == 1 + max(before, default=0)
            self.deliveries.append(Delivery(row.id, message, row.handler, row.generation))

    # --- messages

    @rule(test=st.booleans())
    def a_message_comes(self, test: bool) -> None:
        content = body(f"log-{len(self.messages)}", Test=test)
        kept_back = test and not self.tests_accepted
        assert self._arrives(content) == ("quarantined" if kept_back else "accepted")
        self.messages.append(Arrived(self.latest, content, test, "quarantined" if kept_back else "accepted"))
        if not kept_back:
            self._add(self.latest)

    @precondition(lambda self: self.messages)
    @rule(which=nth)
    def it_comes_again(self, which: int) -> None:
        """Nothing new of it; but what of it is dead or was kept back runs after all."""
        message = self.messages[which % len(self.messages)]
        assert self._arrives(message.content) == "duplicate"
        assert self.latest == message.id
        for each in self.deliveries:
            if each.message == message.id and each.state == "dead":
                each.state, each.attempts = "pending", 0
        if message.state == "quarantined" and self.tests_accepted:
            message.state = "accepted"
            self._add(message.id)

    @precondition(lambda self: self.messages)
    @rule(which=nth)
    def its_key_comes_with_another_content(self, which: int) -> None:
        """A message of its own."""
        old = self.messages[which % len(self.messages)]
        log = self.door.value("SELECT log_id FROM messages WHERE id = :id", id=old.id)
        content = body(log, outside=f"Grace-{len(self.messages)}")
        assert self._arrives(content) == "accepted"
        assert self.door.value("SELECT id_conflict FROM messages WHERE id = :id", id=self.latest)
        self.messages.append(Arrived(self.latest, content, False, "accepted"))
        self._add(self.latest)

    @rule(accept=st.booleans())
    def an_operator_decides_on_tests(self, accept: bool) -> None:
        self.registration.set_destination(
            DESTINATION, datetime.now(UTC), {"test_messages": "accept" if accept else "quarantine"}
        )
        self.tests_accepted = accept

    # --- workers

    @rule(name=st.sampled_from(HANDLERS), worker=st.sampled_from(WORKERS))
    def a_worker_claims(self, name: str, worker: str) -> None:
        lane = self.lanes[name]
        free = not lane.leased and (lane.state == "ready" or (lane.state == "waiting" and lane.due))
        fence = leases.claim(self.connection, lane.name, worker, 3600)
        assert (fence is not None) == (free and not lane.paused and bool(self.pending(name)))
        if fence is not None:
            assert fence.epoch == lane.epoch + 1
            lane.epoch, lane.owner, lane.leased, lane.state = fence.epoch, worker, True, "ready"
            self.fences.append((name, fence))

    @precondition(lambda self: self.fences)
    @rule(which=nth)
    def it_reads_and_begins(self, which: int) -> None:
        """The oldest that waits, and its attempt is counted; nothing where the lease is lost, or the handler paused."""
        name, fence = self.fences[-1 - which % len(self.fences)]
        able = self.current(name, fence) and not self.lanes[name].paused
        found = waiting_deliveries.batch(self.connection, fence)
        assert [each.id for each in found] == [each.id for each in self.pending(name) if able]
        head = next(iter(self.pending(name)), None)
        if head is None or any(each == fence for _, each, _, _ in self.running):
            return  # a lane runs one delivery after another
        attempt = outcomes.start(self.connection, fence, head.id)
        assert attempt == (head.attempts + 1 if able else None)
        if attempt is not None:
            assert found[0].lost == head.begun
            head.attempts, head.begun, head.epoch = attempt, True, fence.epoch
            self.running.append((name, fence, head.id, attempt))

    def _ends(self, which: int) -> tuple[str, Lease, Delivery, int, bool]:
        """A run that ends now, and whether that counts."""
        name, fence, number, attempt = self.running.pop(which % len(self.running))
        [delivery] = [each for each in self.deliveries if each.id == number]
        counts = self.current(name, fence) and (delivery.state, delivery.attempts) == ("pending", attempt)
        return name, fence, delivery, attempt, counts

    @precondition(lambda self: self.running)
    @rule(which=nth, go_on=st.booleans())
    def it_succeeds(self, which: int, go_on: bool) -> None:
        """The success is recorded and the next one begun, in one statement; from a lease that is lost, neither."""
        name, fence, delivery, attempt, counts = self._ends(which)
        following = next((each for each in self.pending(name) if each.id > delivery.id), None) if go_on else None
        done, started = outcomes.succeed(
            self.connection, fence, delivery.id, attempt, following=None if following is None else following.id
        )
        assert done == counts
        if counts:
            delivery.state, delivery.begun = "succeeded", False
        begins = counts and following is not None and not self.lanes[name].paused
        assert started == (following.attempts + 1 if following is not None and begins else None)
        if following is not None and started is not None:
            following.attempts, following.begun, following.epoch = started, True, fence.epoch
            self.running.append((name, fence, following.id, started))

    @precondition(lambda self: self.running)
    @rule(which=nth, becomes=st.sampled_from(["dead", "waiting", "held", "again"]), counted=st.booleans())
    def it_fails(self, which: int, becomes: str, counted: bool) -> None:
        name, fence, delivery, attempt, counts = self._ends(which)
        lane = self.lanes[name]
        lane_state = becomes if becomes in ("waiting", "held") else None
        state = "dead" if becomes == "dead" else "pending"
        assert counts == outcomes.fail(
            self.connection,
            fence,
            delivery.id,
            attempt,
            DeliveryFailure(
                outcome="failed",
                state=state,
                error_class="KeyError",
                counted=counted,
                lane_state=lane_state,
                pause=3600 if becomes == "waiting" else None,
                release=True,
            ),
        )
        if counts:
            delivery.state, delivery.begun = state, False
            delivery.attempts -= not counted
            lane.owner, lane.leased = None, False
            lane.state, lane.due = lane_state or lane.state, False

    @precondition(lambda self: self.fences)
    @rule(which=nth)
    def it_gives_the_lane_back(self, which: int) -> None:
        name, fence = self.fences[which % len(self.fences)]
        kept = self.current(name, fence)
        assert leases.renew(self.connection, fence.owner, {fence.lane: fence.epoch}, 3600) == (
            {fence.lane} if kept else set()
        )
        leases.release(self.connection, fence)
        if kept:
            self.lanes[name].owner, self.lanes[name].leased = None, False

    @rule(name=st.sampled_from(HANDLERS))
    def a_worker_vanishes(self, name: str) -> None:
        """Its lease ends; it may come back and not know."""
        self.door.rows(
            "UPDATE lanes SET lease_until = now() - interval '1 second' WHERE lane = :lane AND owner IS NOT NULL",
            lane=self.lanes[name].name,
        )
        self.lanes[name].leased = False

    @rule(name=st.sampled_from(HANDLERS))
    def time_goes_by(self, name: str) -> None:
        """What a lane waits for has come."""
        self.door.rows(
            "UPDATE lanes SET ready_at = now() - interval '1 second' WHERE lane = :lane AND state = 'waiting'",
            lane=self.lanes[name].name,
        )
        self.lanes[name].due = self.lanes[name].state == "waiting"

    # --- operators

    @rule(name=st.sampled_from(HANDLERS), pause=st.booleans())
    def an_operator_pauses(self, name: str, pause: bool) -> None:
        now = datetime.now(UTC)
        if pause:
            self.registration.pause_handler(name, now, destination=DESTINATION, reason="operator")
        else:
            self.registration.resume_handler(name, now, destination=DESTINATION)
        self.lanes[name].paused = pause

    @precondition(lambda self: any(lane.state == "held" for lane in self.lanes.values()))
    @rule()
    def an_operator_releases_lanes(self) -> None:
        for lane in self.lanes.values():
            if lane.state == "held":
                self.lane_corrections.release(lane.name, datetime.now(UTC), reason=WHY)
                lane.state = "ready"

    @precondition(lambda self: self.deliveries)
    @rule(which=nth, skip=st.booleans())
    def an_operator_puts_right(self, which: int, skip: bool) -> None:
        """Retry or skip one delivery, which is left alone while a worker that lives is at it."""
        delivery = self.deliveries[which % len(self.deliveries)]
        lane = self.lanes[delivery.handler]
        at_work = delivery.state == "pending" and delivery.begun and lane.leased and lane.epoch == delivery.epoch
        able = delivery.state in (("pending", "dead") if skip else ("pending", "dead", "skipped")) and not at_work
        verb = self.delivery_corrections.skip if skip else self.delivery_corrections.retry
        [batch] = verb(DeliveryFilter(ids=(delivery.id,)), datetime.now(UTC), reason=WHY).batches
        assert batch.done == ((delivery.id,) if able else ())
        if able:
            delivery.state, delivery.begun = "skipped" if skip else "pending", False
            delivery.attempts = delivery.attempts if skip else 0
            self._wake(lane, delivery)

    def _wake(self, lane: Lane, delivery: Delivery) -> None:
        if not lane.leased and (lane.state == "waiting" or (lane.state == "held" and lane.epoch == delivery.epoch)):
            lane.state, lane.due = "ready", False

    @precondition(lambda self: self.messages)
    @rule(which=nth)
    def an_operator_replays(self, which: int) -> None:
        """Anew at the end of its lanes, but where it is pending already."""
        message = self.messages[which % len(self.messages)]
        [batch] = self.message_corrections.replay(
            MessageFilter(ids=(message.id,)), datetime.now(UTC), reason=WHY
        ).batches
        waiting = {each.handler for each in self.deliveries if (each.message, each.state) == (message.id, "pending")}
        wanted = set(HANDLERS) - waiting if message.state == "accepted" else set()
        assert batch.done == ((message.id,) if wanted else ())
        self._add(message.id, wanted)

    @precondition(lambda self: self.messages)
    @rule(which=nth, discard=st.booleans())
    def an_operator_empties_the_quarantine(self, which: int, discard: bool) -> None:
        message = self.messages[which % len(self.messages)]
        verb = self.message_corrections.discard if discard else self.message_corrections.release
        [batch] = verb(MessageFilter(ids=(message.id,)), datetime.now(UTC), reason=WHY).batches
        done = message.state == "quarantined" and (discard or self.tests_accepted)
        assert batch.done == ((message.id,) if done else ())
        if done:
            message.state = "discarded" if discard else "accepted"
            self._add(message.id, () if discard else HANDLERS)

    # --- what must hold

    @invariant()
    def the_rows_are_the_model(self) -> None:
        rows = self.door.rows(
            "SELECT id, state, attempts, started_at IS NOT NULL AS begun, epoch FROM deliveries ORDER BY id"
        )
        assert [tuple(row) for row in rows] == [
            (each.id, each.state, each.attempts, each.begun, each.epoch)
            for each in sorted(self.deliveries, key=lambda each: each.id)
        ]
        found: dict[str, Any] = {row.lane: row for row in self.door.rows("SELECT lane, state, epoch, owner FROM lanes")}
        for lane in self.lanes.values():
            row = found.get(lane.name)
            assert (("ready", 0, None) if row is None else (row.state, row.epoch, row.owner)) == (
                lane.state,
                lane.epoch,
                lane.owner,
            )
        states = self.door.rows("SELECT id, state FROM messages ORDER BY id")
        assert [tuple(row) for row in states] == [(each.id, each.state) for each in self.messages]

    @invariant()
    def nothing_overtakes(self) -> None:
        """Under the lease that stands, one delivery of a lane is running at most."""
        for name, lane in self.lanes.items():
            at_work = [
                each
                for each in self.deliveries
                if each.handler == name
                and each.state == "pending"
                and each.begun
                and each.epoch == lane.epoch
                and lane.owner is not None
            ]
            assert len(at_work) <= 1


def test_what_is_promised_holds_in_any_order(migrated_database: str, keyring: Keyring) -> None:
    """Whatever happens in whatever order, ledger and lanes do what the model says, and the evidence holds."""

    class Here(Promised):
        def __init__(self) -> None:
            super().__init__(migrated_database, keyring)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=AGAIN,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
