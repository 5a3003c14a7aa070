from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine

from receiver.errors import BadTransfer, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.pipeline import HeadAccepted, check_head
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.operations import queries
from receiver.storage.operations.queries import AuditFilter, DeliveryFilter, MessageFilter
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.loader import load_registry
from tests.storage.door import DESTINATION, SOURCE, TOKEN, Door, body, handler
from tests.storage.hand import FRAMES, LANE, Hand, arrive
from tests.support.waiting import until

STRANGER = "22222222-2222-4222-8222-222222222222"


@pytest.fixture
def ask(engine: Engine) -> Callable[..., Any]:
    """Run one query."""

    def one(question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with engine.connect() as connection:
            return question(connection, *arguments, **options)

    return one


def now() -> datetime:
    return datetime.now(UTC)


def refuse(door: Door, ledger: MessageLedger, content: bytes, **request: str) -> None:
    """Have a request refused, and wait for its audit row."""
    before = door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'")
    ledger.refuse(door.refuse(content, **request))
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'") > before, "audited")


class TestRegistry:
    def test_no_row_tells_a_secret(self, door: Door, ask: Callable[..., Any]) -> None:
        """No list of the registry contains a digest, a sealed secret or a MAC."""
        door.registration.add_credential(
            DESTINATION, now(), "hmac", {"encoding": "hex"}, b"a signing secret of tests", label="redox"
        )
        door.enable()
        for listed in (queries.destinations, queries.credentials, queries.sources, queries.subscriptions):
            for row in ask(listed):
                assert not {"digest", "secret", "secret_key", "mac", "mac_key"} & row.keys()
                assert not any(isinstance(value, bytes) for value in row.values())

    def test_whether_a_credential_opens_anything(self, door: Door, ask: Callable[..., Any]) -> None:
        """A revoked or expired credential is not live; one that will expire is."""

        def add(label: str, suffix: str, expires_at: datetime | None = None) -> int:
            return door.registration.add_credential(
                DESTINATION, now(), "token", {}, (TOKEN + suffix).encode(), label=label, expires_at=expires_at
            )

        add("expired", "2", expires_at=now() - timedelta(seconds=1))
        add("expiring", "3", expires_at=now() + timedelta(days=1))
        door.registration.revoke_credential(add("revoked", "4"), now())
        found = ask(queries.credentials, destination=DESTINATION)
        assert {each["label"]: each["live"] for each in found} == {
            None: True,
            "expired": False,
            "expiring": True,
            "revoked": False,
        }

    def test_only_of_one_destination(self, door: Door, ask: Callable[..., Any]) -> None:
        """A destination lists its own rows; an unknown one is an error."""
        door.registration.add_destination(
            "other",
            now(),
            environment="development",
            require=["token"],
            sources_policy="any",
            on_unknown_source="reject",
            test_messages="accept",
            reply_with=None,
            token=TOKEN,
        )
        assert ask(queries.sources, destination="other") == []
        assert [each["source_id"] for each in ask(queries.sources, destination=DESTINATION)] == [SOURCE]
        assert {each["destination"] for each in ask(queries.credentials)} == {DESTINATION, "other"}
        with pytest.raises(NotFound, match="destination list"):
            ask(queries.credentials, destination="nowhere")

    def test_whether_a_worker_has_the_handler(self, door: Door, ask: Callable[..., Any]) -> None:
        """A handler is loaded if a live worker names it."""
        door.enable()
        door.enable(handler("other"))
        door.rows(
            "INSERT INTO workers (name, host, pid, handlers, seen_at) VALUES ('w', 'h', 1, '{register}', now()), "
            "('gone', 'h', 2, '{other}', now() - interval '1 hour')"
        )
        assert {each["handler"]: each["loaded"] for each in ask(queries.subscriptions)} == {
            "register": True,
            "other": False,
        }
        assert {each["name"]: each["alive"] for each in ask(queries.workers)} == {"w": True, "gone": False}


class TestRefusedSources:
    def test_unknown_sources_with_what_adds_them(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]
    ) -> None:
        """Each refused source is listed once, with the count and the arguments of `source add`."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(Source=None))
        found = {each["source_id"]: each for each in ask(queries.refused_sources, limit=10)}
        assert found[STRANGER]["count"] == 2
        assert found[STRANGER]["add"] == f"clinic {STRANGER}"
        assert found[STRANGER]["reason"] == "source_unknown"
        assert found[None]["add"] == "clinic --none"

    def test_not_those_that_are_registered_by_now(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]
    ) -> None:
        """A refused source that was added since is not listed; a disabled one is."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(Source=None))
        door.registration.add_source(DESTINATION, STRANGER, now(), name=None)
        door.registration.add_source(DESTINATION, None, now(), name=None)
        assert ask(queries.refused_sources, limit=10) == []
        door.registration.disable_source(DESTINATION, STRANGER, now())
        assert [each["source_id"] for each in ask(queries.refused_sources, limit=10)] == [STRANGER]

    @pytest.mark.parametrize(
        ("claimed", "add"), [("-n7", "clinic -- -n7"), ("x; rm -rf /", None), ("$(id)", None), ("a b", None)]
    )
    def test_nothing_to_paste_but_an_id(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], claimed: str, add: str | None
    ) -> None:
        """A source in a message cannot become an option or a command when the operator pastes the line."""
        refuse(door, ledger, body(source=claimed))
        (found,) = ask(queries.refused_sources, limit=10)
        assert found["add"] == add
        assert (found["source_digest"] is None) == (add is not None)

    def test_those_kept_in_quarantine_too(
        self,
        open_ledger: Callable[..., MessageLedger],
        engine: Engine,
        keyring: Keyring,
        registration: RegistryChanges,
        ask: Callable[..., Any],
    ) -> None:
        """Unknown sources of quarantined messages are listed as well."""
        door = Door(engine, keyring, registration).build(on_unknown_source="quarantine")
        arrive(door, open_ledger(), body(source=STRANGER), body("2", source="x; reboot"))
        found = {each["source_id"]: each["add"] for each in ask(queries.refused_sources, limit=10)}
        assert found == {STRANGER: f"clinic {STRANGER}", "x; reboot": None}

    def test_since_and_destination(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """Only sources seen since then, at that destination, are listed."""
        refuse(door, ledger, body(source=STRANGER))
        lately = now() - timedelta(hours=1)
        assert len(ask(queries.refused_sources, destination=DESTINATION, since=lately, limit=9)) == 1
        assert ask(queries.refused_sources, since=now() + timedelta(hours=1), limit=9) == []
        with pytest.raises(NotFound):
            ask(queries.refused_sources, destination="nowhere", limit=9)


class TestMessages:
    def test_pages_are_whole(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """Each message is on one page, newest first, while others arrive."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        first = ask(queries.messages, MessageFilter(), limit=2)
        arrive(door, ledger, body("new"))
        second = ask(queries.messages, MessageFilter(), before=first[-1]["id"], limit=2)
        third = ask(queries.messages, MessageFilter(), before=second[-1]["id"], limit=2)
        assert [each["id"] for each in (*first, *second, *third)] == numbers[::-1]

    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"kind": "Results.New"}, 1),
            ({"state": "quarantined"}, 1),
            ({"quarantine_reason": "not_json"}, 1),
            ({"source_id": SOURCE}, 2),
            ({"destination": DESTINATION}, 3),
            ({"kind": "Results.New", "state": "quarantined"}, 0),
            ({"since": datetime(2020, 1, 1, tzinfo=UTC)}, 3),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], where: dict[str, Any], found: int
    ) -> None:
        """Each filter is a column; all that are given must hold."""
        arrive(door, ledger, body("1"), body("2", kind="Results.New"), b"no json")
        assert len(ask(queries.messages, MessageFilter(**where), limit=9)) == found

    def test_by_id_and_by_uuid(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """A message is found by its id or its uuid, and shows whether its bytes are kept."""
        (number,) = arrive(door, ledger, body())
        found = ask(queries.message, number)
        assert found == ask(queries.message, found["uuid"])
        assert found["payload"] is True
        door.rows("DELETE FROM payloads")
        assert ask(queries.message, number)["payload"] is False
        for unknown in (999, uuid4()):
            with pytest.raises(NotFound):
                ask(queries.message, unknown)

    def test_the_exact_bytes(
        self, door: Door, ledger: MessageLedger, keyring: Keyring, ask: Callable[..., Any]
    ) -> None:
        """The payload is byte for byte what was received, None if it is purged, and an error if it belongs to another
        message.
        """
        contents = body("1"), body("2")
        one, other = (ask(queries.message, each) for each in arrive(door, ledger, *contents))
        seals, digests = Sealer(keyring), KeyedDigests(keyring)
        assert ask(queries.payload, seals, digests, one) == contents[0]
        with pytest.raises(IntegrityError):
            ask(queries.payload, seals, digests, one | {"uuid": other["uuid"]})
        door.rows("UPDATE messages SET digest = sha256(digest)")
        with pytest.raises(IntegrityError, match="not what was received"):
            ask(queries.payload, seals, digests, one)
        door.rows("DELETE FROM payloads")
        assert ask(queries.payload, seals, digests, one) is None


class TestDeliveries:
    @pytest.fixture
    def made(self, door: Door, ledger: MessageLedger, engine: Engine) -> list[int]:
        """Three deliveries: dead, running, pending."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        Hand(engine).take().fail()
        Hand(engine).take().begin()
        return [row.id for row in door.rows("SELECT id FROM deliveries ORDER BY id")]

    def test_newest_first_with_what_runs(self, made: list[int], ask: Callable[..., Any]) -> None:
        """A delivery shows its message and kind, and whether it is running."""
        found = ask(queries.deliveries, DeliveryFilter(), limit=9)
        assert [(each["id"], each["state"], each["running"]) for each in found] == [
            (made[2], "pending", False),
            (made[1], "pending", True),
            (made[0], "dead", False),
        ]
        assert {each["kind"] for each in found} == {"PatientAdmin.Arrival"}
        assert all(isinstance(each["message_uuid"], UUID) for each in found)
        assert [each["id"] for each in ask(queries.deliveries, DeliveryFilter(), before=made[2], limit=1)] == [made[1]]

    def test_an_attempt_whose_lease_is_over_does_not_run(
        self, made: list[int], door: Door, ask: Callable[..., Any]
    ) -> None:
        """An attempt whose lease has ended is not running."""
        door.rows("UPDATE lanes SET lease_until = now() - interval '1 second'")
        assert not any(each["running"] for each in ask(queries.deliveries, DeliveryFilter(), limit=9))

    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"handler": "register"}, 3),
            ({"handler": "other"}, 0),
            ({"state": "dead"}, 1),
            ({"error_class": "KeyError"}, 1),
            ({"lane": LANE}, 3),
            ({"destination": DESTINATION}, 3),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(self, made: list[int], ask: Callable[..., Any], where: dict[str, Any], found: int) -> None:
        """Each filter is a column; all that are given must hold."""
        assert len(ask(queries.deliveries, DeliveryFilter(**where), limit=9)) == found

    def test_since_is_when_it_ended(self, made: list[int], door: Door, ask: Callable[..., Any]) -> None:
        """`since` compares the end of a finished delivery."""
        door.rows("UPDATE deliveries SET created_at = now() - interval '1 day'")
        found = ask(queries.deliveries, DeliveryFilter(since=now() - timedelta(hours=1)), limit=9)
        assert [each["id"] for each in found] == [made[0]]

    def test_one_with_its_attempts(self, made: list[int], ask: Callable[..., Any]) -> None:
        """A delivery shows its attempts in order, with frames, and without the text of an error."""
        found = ask(queries.delivery, made[0])
        assert [(each["attempt"], each["outcome"], each["error_frames"]) for each in found["delivery_attempts"]] == [
            (1, "failed", FRAMES)
        ]
        assert found["error_frames"] == FRAMES
        assert "error_sealed" not in found
        with pytest.raises(NotFound):
            ask(queries.delivery, 999)

    def test_nothing_asked_for_is_told_apart(self) -> None:
        """A filter without conditions is recognized."""
        assert queries.empty(DeliveryFilter())
        assert not queries.empty(DeliveryFilter(state="dead"))
        assert queries.empty(MessageFilter())
        assert not queries.empty(MessageFilter(ids=(1,)))


class TestLanes:
    def test_a_lane_that_never_ran(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """A lane without a row is ready, with the number and the age of its deliveries."""
        door.enable()
        arrive(door, ledger, body("1"), body("2"))
        (found,) = ask(queries.lanes, limit=9)
        assert (found["lane"], found["state"], found["pending"], found["handler"]) == (LANE, "ready", 2, "register")
        assert found["head"] == door.value("SELECT min(id) FROM deliveries")
        assert found["oldest_pending_at"] == door.value("SELECT min(created_at) FROM deliveries")

    def test_the_states(self, door: Door, ledger: MessageLedger, engine: Engine, ask: Callable[..., Any]) -> None:
        """Running, waiting, held and paused lanes are distinguished, and can be selected by state."""
        door.enable()
        arrive(door, ledger, body("1"), body("2"))
        hand = Hand(engine)

        def state() -> str:
            (found,) = ask(queries.lanes, limit=9)
            assert ask(queries.lanes, state=found["state"], limit=9) == [found]
            return str(found["state"])

        hand.take().begin()
        assert state() == "running"
        hand.leave()
        door.rows("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'")
        assert state() == "waiting"
        door.registration.pause_handler("register", now(), destination=None, reason="operator")
        assert state() == "paused"
        door.rows("UPDATE lanes SET state = 'held'")
        assert state() == "held"

    def test_where_nothing_waits(
        self, door: Door, ledger: MessageLedger, engine: Engine, ask: Callable[..., Any]
    ) -> None:
        """A lane without pending deliveries is listed only if it runs or is held."""
        door.enable()
        arrive(door, ledger, body("1"))
        hand = Hand(engine).take()
        hand.succeed()
        assert [each["state"] for each in ask(queries.lanes, limit=9)] == ["running"]
        hand.leave()
        assert ask(queries.lanes, limit=9) == []
        door.rows("UPDATE lanes SET state = 'held'")
        assert [(each["state"], each["pending"]) for each in ask(queries.lanes, limit=9)] == [("held", 0)]

    def test_filters(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """By handler and by destination, the longest waiting first."""
        door.enable()
        door.enable(handler("other", ordering="patient", patient_key="MR"))
        arrive(door, ledger, body("1"))
        assert len(ask(queries.lanes, limit=9)) == 2
        assert len(ask(queries.lanes, limit=1)) == 1
        assert [each["handler"] for each in ask(queries.lanes, handler="other", limit=9)] == ["other"]
        assert len(ask(queries.lanes, destination=DESTINATION, limit=9)) == 2
        with pytest.raises(NotFound):
            ask(queries.lanes, destination="nowhere", limit=9)


class TestAudit:
    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"action": "destination.add"}, 1),
            ({"action": "message"}, 2),
            ({"action": "mess"}, 0),
            ({"outcome": "accepted"}, 0),
            ({"outcome": "unhandled"}, 1),
            ({"reason": "not_json"}, 1),
            ({"actor": "redox"}, 2),
            ({"actor": "tester@test"}, 2),
            ({"subject": "destinations:1"}, 1),
            ({"destination": "nowhere"}, 0),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], where: dict[str, Any], found: int
    ) -> None:
        """Each filter is a column; a subject alone means all of its verbs, and not what begins like it."""
        arrive(door, ledger, body(), b"no json")
        assert len(ask(queries.audit, AuditFilter(**where), limit=9)) == found

    def test_of_one_message(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """All audit rows of a message are listed, newest first, with those of its repeats; `detail` is a value."""
        number, _ = arrive(door, ledger, body(), body())
        uuid = ask(queries.message, number)["uuid"]
        found = ask(queries.audit, AuditFilter(message_uuid=uuid), limit=9)
        assert [each["outcome"] for each in found] == ["duplicate", "unhandled"]
        assert found[0]["detail"]["attempt"] == "log-1-attempt"
        assert ask(queries.audit, AuditFilter(message_uuid=uuid), before=found[0]["id"], limit=9) == found[1:]

    def test_a_reason_that_nobody_gave(self, door: Door, keyring: Keyring, ask: Callable[..., Any]) -> None:
        """A row without a reason has none; a row that does not exist is an error."""
        row = ask(queries.audit, AuditFilter(), limit=1)[0]
        assert row["noted"] is False
        assert ask(queries.note, Sealer(keyring), row["id"]) is None
        with pytest.raises(NotFound):
            ask(queries.note, Sealer(keyring), 999_999)


class TestFeedStatus:
    @pytest.fixture
    def status(self, ask: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
        """Return the feed status of the destination."""

        def told() -> dict[str, Any]:
            (found,) = ask(queries.feed_status)
            assert isinstance(found, dict)
            return found

        return told

    def test_before_anything(self, door: Door, status: Callable[[], dict[str, Any]]) -> None:
        """A destination that has received nothing is not paused."""
        assert status() == {
            "destination": DESTINATION,
            "environment": "production",
            "enabled": True,
            "last_200_at": None,
            "last_refusal_at": None,
            "last_refusal_reason": None,
            "last_refusal_status": None,
            "last_refusal_authentic": False,
            "probably_paused": False,
            "backlog": 0,
            "oldest_pending_at": None,
            "waiting": [],
            "held_lanes": [],
            "paused_handlers": [],
            "unserved": [],
            "dead": [],
            "quarantined": 0,
            "quarantined_bytes": 0,
            "quarantine": [],
        }

    def test_a_refused_feed_is_paused_until_the_next_200(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """After a refusal with a valid token, Redox has paused the feed; the next accepted message ends that."""
        arrive(door, ledger, body("1"))
        assert status()["probably_paused"] is False
        refuse(door, ledger, body("2", source=STRANGER))
        told = status()
        assert told["probably_paused"] is True
        assert (told["last_refusal_reason"], told["last_refusal_status"], told["last_refusal_authentic"]) == (
            "source_unknown",
            403,
            True,
        )
        arrive(door, ledger, body("2"))
        told = status()
        assert told["probably_paused"] is False
        assert told["last_200_at"] > told["last_refusal_at"]

    def test_a_stranger_pauses_nothing(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """A wrong token is shown as the last refusal, and does not mean that the feed is paused."""
        refuse(door, ledger, body(), token="a token that nobody ever had")
        told = status()
        assert told["last_refusal_reason"] == "token_wrong"
        assert told["last_refusal_authentic"] is False
        assert told["probably_paused"] is False

    def test_a_stranger_does_not_hide_a_pause(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """Wrong tokens after a refusal of Redox do not hide that the feed is paused."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(), token="a token that nobody ever had")
        assert status()["probably_paused"] is True

    def test_a_token_that_was_ours_is_redox(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]], ask: Callable[..., Any]
    ) -> None:
        """A request with a revoked token is from Redox, which has paused the feed."""
        (number,) = (each["id"] for each in ask(queries.credentials))
        door.registration.revoke_credential(number, now())
        refuse(door, ledger, body())
        told = status()
        assert told["last_refusal_reason"] == "token_revoked"
        assert told["probably_paused"] is True

    @pytest.mark.parametrize(
        ("reason", "status_hint", "paused"), [("body_too_large", 413, True), ("body_incomplete", 400, False)]
    )
    def test_a_body_that_is_too_large_is_redox(
        self,
        door: Door,
        ledger: MessageLedger,
        engine: Engine,
        keyring: Keyring,
        status: Callable[[], dict[str, Any]],
        reason: str,
        status_hint: int,
        paused: bool,
    ) -> None:
        """A body that is too large is from Redox, because it was read only after a valid head; one that was cut off may
        be from anyone.
        """
        head = door.admit(body()).inbound.head
        with engine.connect() as connection:
            known = load_registry(connection, keyring)
        accepted = check_head(head, known, door.now)
        assert isinstance(accepted, HeadAccepted)
        ledger.refuse(accepted.not_received(BadTransfer(reason, status_hint=status_hint)))
        until(lambda: status()["last_refusal_reason"] == reason, "audited")
        assert status()["probably_paused"] is paused

    def test_what_waits_and_what_died(
        self, door: Door, ledger: MessageLedger, engine: Engine, status: Callable[[], dict[str, Any]]
    ) -> None:
        """The status shows the backlog and its age, dead deliveries by handler and class, handlers that no worker has
        loaded, held lanes and paused handlers.
        """
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        hand = Hand(engine)
        hand.take().fail()
        hand.take().fail()
        hand.take().fail("pending", lane_state="held")
        door.registration.pause_handler("register", now(), destination=None, reason="operator")
        told = status()
        assert told["backlog"] == 2
        assert told["oldest_pending_at"] == door.value("SELECT min(created_at) FROM deliveries WHERE state = 'pending'")
        assert [(each["handler"], each["error_class"], each["count"]) for each in told["dead"]] == [
            ("register", "KeyError", 2)
        ]
        assert told["unserved"] == [{"handler": "register", "pending": 2}]
        assert told["held_lanes"] == [LANE]
        assert [(each["handler"], each["pause_reason"]) for each in told["paused_handlers"]] == [
            ("register", "operator")
        ]
        door.rows("INSERT INTO workers (name, host, pid, handlers) VALUES ('w', 'h', 1, '{register}')")
        assert status()["unserved"] == []

    def test_what_is_in_quarantine(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """The status shows count and bytes in quarantine, in total and by reason, without discarded messages."""
        arrive(door, ledger, b"no json", b"nor this", body(Test=True))
        told = status()
        assert told["quarantined"] == 3
        assert told["quarantined_bytes"] == len(b"no json") + len(b"nor this") + len(body(Test=True))
        assert {each["quarantine_reason"]: each["count"] for each in told["quarantine"]} == {
            "not_json": 2,
            "test_message": 1,
        }
        door.rows("UPDATE messages SET state = 'discarded'")
        assert status()["quarantined"] == 0
