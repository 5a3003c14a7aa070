"""What the verbs of the ledger write, and what a repeat takes up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
from msgspec import structs

from receiver.errors import Unavailable
from receiver.keyring import Keyring
from receiver.pipeline import Admitted
from receiver.storage.accept.group_commit import _FLUSH_INTERVAL
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.accept.sql import MIN_QUARANTINED_SIZE
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.evidence.verify import verify
from tests.storage.door import DESTINATION, SOURCE, Door, body, handler, stalled
from tests.support.waiting import until


def proved(door: Door) -> None:
    """Everything written so far proves to be what was written."""
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring, payloads=True).first_bad is None


# --- accepted


def test_an_accepted_message_is_there_whole_when_the_receipt_comes(door: Door, ledger: MessageLedger) -> None:
    """Message, sealed payload, delivery and audit row are committed before the future is done."""
    door.enable()
    content = body(FacilityCode="F1", Transmission={"ID": 7}, Message={"ID": "m"})
    receipt = ledger.accept(door.admit(content)).result(10)
    assert (receipt.outcome, receipt.inline) == ("accepted", ())
    row = door.rows("SELECT * FROM messages")[0]
    assert (row.id, str(row.uuid)) == (receipt.message_id, receipt.uuid)
    assert (row.digest, row.size, row.kind, row.state) == (
        KeyedDigests(door.keyring).content(content),
        len(content),
        "PatientAdmin.Arrival",
        "accepted",
    )
    assert (row.log_id, row.attempt_id, row.facility, row.transmission_id, row.message_id) == (
        "log-1",
        "log-1-attempt",
        "F1",
        "7",
        "m",
    )
    assert (row.content_type, row.peer, row.query, row.test, row.id_conflict) == (
        "application/json",
        "192.0.2.1",
        False,
        False,
        False,
    )
    assert row.credential_ids == [door.value("SELECT id FROM credentials")]
    payload = door.rows("SELECT * FROM payloads")[0]
    assert Sealer(door.keyring).open_body(payload.payload_key, payload.sealed, payload_binding(receipt.uuid)) == content
    assert b"Ada" not in payload.sealed
    delivery = door.rows("SELECT * FROM deliveries")[0]
    assert (delivery.message_id, delivery.handler, delivery.generation, delivery.state, delivery.inline) == (
        row.id,
        "register",
        1,
        "pending",
        False,
    )
    event = door.rows("SELECT * FROM audit_events WHERE action = 'message.receive'")[0]
    assert (event.outcome, event.message_uuid, event.destination, event.peer, event.actor, event.n) == (
        "accepted",
        row.uuid,
        DESTINATION,
        "192.0.2.1",
        "redox",
        1,
    )
    assert json.loads(event.detail) == {"attempt": "log-1-attempt", "credentials": row.credential_ids}
    proved(door)


def test_a_message_that_nobody_subscribes_to_is_kept(door: Door, ledger: MessageLedger) -> None:
    """Unhandled, with its bytes."""
    assert ledger.accept(door.admit(body())).result(10).outcome == "unhandled"
    assert door.value("SELECT count(*) FROM payloads") == 1
    assert door.value("SELECT count(*) FROM deliveries") == 0


def test_what_cannot_be_read_is_kept_with_a_reason(door: Door, ledger: MessageLedger) -> None:
    """In quarantine, its columns empty, its bytes exact; a repeat of the bytes is a duplicate."""
    content = b'{"Meta": "\xff'
    receipt = ledger.accept(door.admit(content)).result(10)
    assert receipt.outcome == "quarantined"
    row = door.rows("SELECT * FROM messages")[0]
    assert (row.state, row.quarantine_reason, row.kind, row.log_id, row.digest) == (
        "quarantined",
        "not_utf8",
        None,
        None,
        KeyedDigests(door.keyring).content(content),
    )
    assert ledger.accept(door.admit(content)).result(10).outcome == "duplicate"
    proved(door)


def test_a_handler_that_acknowledges_after_handling_is_named_in_the_receipt(door: Door, ledger: MessageLedger) -> None:
    """Its delivery is run in the request: the receipt says which; so does that of a repeat while it is pending."""
    door.enable(handler("now", acknowledge="after_handling"))
    door.enable(handler("later"))
    first = ledger.accept(door.admit(body())).result(10)
    inline = door.value("SELECT id FROM deliveries WHERE inline")
    assert first.inline == (inline,)
    assert ledger.accept(door.admit(body())).result(10).inline == (inline,)
    door.rows("UPDATE deliveries SET state = 'succeeded' WHERE inline")
    assert ledger.accept(door.admit(body())).result(10).inline == ()


def test_the_lanes_that_have_something_new_are_told_after_the_commit(
    door: Door, open_ledger: Callable[..., MessageLedger]
) -> None:
    """The hint names each lane that a worker has to look at, and none of what the request runs itself."""
    audited: list[str] = []
    door.enable(handler("now", acknowledge="after_handling"))
    door.enable(handler("later"))
    ledger = open_ledger(on_commit=audited.extend)
    ledger.accept(door.admit(body())).result(10)
    until(lambda: audited, "a hint")
    assert audited == [door.value("SELECT lane FROM deliveries WHERE NOT inline")]


def test_a_hint_that_fails_fails_nothing(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """What is committed is answered, and the next as well. Guards `Writer._hint`."""

    def fail(_lanes: object) -> None:
        raise RuntimeError("no hint")

    door.enable()
    ledger = open_ledger(on_commit=fail)
    receipts = [ledger.accept(door.admit(body(f"log-{n}"))).result(10) for n in range(3)]
    assert [receipt.outcome for receipt in receipts] == ["accepted"] * 3


# --- seen before


def test_a_repeat_is_a_duplicate_and_audited_with_its_attempt(door: Door, ledger: MessageLedger) -> None:
    """200, no second message, no second delivery, whatever Meta says of the attempt."""
    door.enable()
    first = ledger.accept(door.admit(body())).result(10)
    again = body(Logs=[{"ID": "log-1", "AttemptID": "second"}], log=None)
    receipt = ledger.accept(door.admit(again)).result(10)
    assert (receipt.outcome, receipt.message_id, receipt.uuid) == ("duplicate", first.message_id, first.uuid)
    assert door.value("SELECT count(*) FROM messages") == 1
    assert door.value("SELECT count(*) FROM deliveries") == 1
    event = door.rows("SELECT * FROM audit_events WHERE outcome = 'duplicate'")[0]
    assert (str(event.message_uuid), json.loads(event.detail)["attempt"]) == (first.uuid, "second")
    assert "taken_up" not in event.detail
    proved(door)


def test_a_repeat_revives_what_is_dead(door: Door, ledger: MessageLedger) -> None:
    """In its place and with all its attempts again; what succeeded stays so."""
    door.enable(handler("dies"))
    door.enable(handler("lives"))
    ledger.accept(door.admit(body())).result(10)
    door.rows("UPDATE deliveries SET state = 'dead', attempts = 10, finished_at = now() WHERE handler = 'dies'")
    door.rows("UPDATE deliveries SET state = 'succeeded' WHERE handler = 'lives'")
    before = door.rows("SELECT id FROM deliveries ORDER BY id")
    assert ledger.accept(door.admit(body())).result(10).outcome == "duplicate"
    assert door.rows("SELECT id FROM deliveries ORDER BY id") == before
    rows = door.rows("SELECT handler, state, attempts, finished_at FROM deliveries ORDER BY handler")
    assert [tuple(row) for row in rows] == [("dies", "pending", 0, None), ("lives", "succeeded", 0, None)]
    assert json.loads(door.value("SELECT detail FROM audit_events WHERE outcome = 'duplicate'"))["taken_up"] == ["dead"]


def test_a_repeat_takes_up_what_nobody_handled(door: Door, ledger: MessageLedger) -> None:
    """A handler is enabled by now: the message is accepted after all, once."""
    ledger.accept(door.admit(body())).result(10)
    door.enable()
    for _ in range(2):
        assert ledger.accept(door.admit(body())).result(10).outcome == "duplicate"
    assert door.value("SELECT state FROM messages") == "accepted"
    assert door.value("SELECT count(*) FROM deliveries") == 1


def test_a_repeat_releases_what_its_source_kept_back(door: Door, ledger: MessageLedger) -> None:
    """The source is registered by now: out of quarantine, dispatched; without a handler, unhandled."""
    door.registration.set_destination(DESTINATION, door.now, {"on_unknown_source": "quarantine"})
    contents = [body(f"log-{n}", source="somebody") for n in range(2)]
    for content in contents:
        assert ledger.accept(door.admit(content)).result(10).outcome == "quarantined"
    door.registration.add_source(DESTINATION, "somebody", door.now, name=None)
    ledger.accept(door.admit(contents[0])).result(10)
    door.enable()
    ledger.accept(door.admit(contents[1])).result(10)
    rows = door.rows("SELECT state, quarantine_reason FROM messages ORDER BY id")
    assert [tuple(row) for row in rows] == [("unhandled", None), ("accepted", None)]
    assert door.value("SELECT count(*) FROM deliveries") == 1
    taken = door.rows("SELECT detail FROM audit_events WHERE outcome = 'duplicate'")
    assert [json.loads(row.detail)["taken_up"] for row in taken] == [["quarantined"]] * 2
    proved(door)


def test_a_repeat_brings_nothing_back_that_was_discarded(door: Door, ledger: MessageLedger) -> None:
    """An operator has decided. Guards the states in `TAKE_UP`."""
    ledger.accept(door.admit(body())).result(10)
    door.rows("UPDATE messages SET state = 'discarded'")
    door.enable()
    assert ledger.accept(door.admit(body())).result(10).outcome == "duplicate"
    assert door.value("SELECT state FROM messages") == "discarded"
    assert door.value("SELECT count(*) FROM deliveries") == 0


def test_the_same_key_with_other_content_is_a_message_of_its_own(door: Door, ledger: MessageLedger) -> None:
    """Flagged and dispatched; only the later one is flagged, and each has its own repeats."""
    door.enable()
    first = ledger.accept(door.admit(body(outside="Ada"))).result(10)
    second = ledger.accept(door.admit(body(outside="Bea"))).result(10)
    assert second.outcome == "accepted"
    rows = door.rows("SELECT id, id_conflict FROM messages ORDER BY id")
    assert [tuple(row) for row in rows] == [(first.message_id, False), (second.message_id, True)]
    assert door.value("SELECT count(*) FROM deliveries") == 2
    assert ledger.accept(door.admit(body(outside="Ada"))).result(10).message_id == first.message_id
    assert ledger.accept(door.admit(body(outside="Bea"))).result(10).message_id == second.message_id


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(body(source="somebody"), body()), (body(Test=True), body()), (body(), body(kind="PatientAdmin.Discharge"))],
    ids=["source", "test", "kind"],
)
def test_the_same_key_with_another_kind_source_or_test_flag_is_a_message_of_its_own(
    door: Door, ledger: MessageLedger, first: bytes, second: bytes, together: bool
) -> None:
    """What is dispatched is what was judged: the second neither lifts the first out of quarantine nor is swallowed."""
    door.registration.set_destination(DESTINATION, door.now, {"on_unknown_source": "quarantine"})
    door.enable()
    kept = "accepted" if first == body() else "quarantined"
    admitted = [door.admit(first), door.admit(second)]
    if together:
        with stalled(door, ledger):
            futures = [ledger.accept(each) for each in admitted]
        receipts = [future.result(10) for future in futures]
    else:
        receipts = [ledger.accept(each).result(10) for each in admitted]
    assert [receipt.outcome for receipt in receipts] == [kept, "accepted"]
    rows = door.rows(
        "SELECT id, state, id_conflict, kind, source_id, test FROM messages WHERE log_id = 'log-1' ORDER BY id"
    )
    assert [(row.id, row.state, row.id_conflict) for row in rows] == [
        (receipts[0].message_id, kept, False),
        (receipts[1].message_id, "accepted", True),
    ]
    message = admitted[1].message
    assert message is not None
    assert (rows[1].kind, rows[1].source_id, rows[1].test) == (message.kind, SOURCE, False)
    dispatched = door.rows("SELECT message_id FROM deliveries WHERE message_id IN (:a, :b)", a=rows[0].id, b=rows[1].id)
    assert {row.message_id for row in dispatched} == {
        receipt.message_id for receipt in receipts if receipt.outcome == "accepted"
    }
    proved(door)


def test_a_repeat_that_is_quarantined_runs_nothing(door: Door, ledger: MessageLedger) -> None:
    """Its source has been disabled since: what is dead stays dead, and nothing runs in the request."""
    door.registration.set_destination(DESTINATION, door.now, {"on_unknown_source": "quarantine"})
    door.enable(handler("now", acknowledge="after_handling"))
    door.enable(handler("dies"))
    ledger.accept(door.admit(body())).result(10)
    door.rows("UPDATE deliveries SET state = 'dead' WHERE handler = 'dies'")
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    receipt = ledger.accept(door.admit(body())).result(10)
    assert (receipt.outcome, receipt.inline) == ("duplicate", ())
    assert [row.state for row in door.rows("SELECT state FROM deliveries ORDER BY handler")] == ["dead", "pending"]
    assert "taken_up" not in door.value("SELECT detail FROM audit_events WHERE outcome = 'duplicate'")


def test_an_identical_body_without_any_id_is_a_repeat_for_a_day(door: Door, ledger: MessageLedger) -> None:
    """After 24 hours it may be meant: its key has expired, it is new, and known from then on again."""
    content = body(log=None)
    first = ledger.accept(door.admit(content)).result(10)
    assert ledger.accept(door.admit(content)).result(10).outcome == "duplicate"
    assert door.value(
        "SELECT expires_at BETWEEN now() + interval '23 h 50 min' AND now() + interval '1 d' FROM message_keys"
    )
    door.rows("UPDATE message_keys SET expires_at = now() - interval '1 second'")
    second = ledger.accept(door.admit(content)).result(10)
    assert (second.outcome, second.message_id > first.message_id) == ("unhandled", True)
    again = ledger.accept(door.admit(content)).result(10)
    assert (again.outcome, again.message_id) == ("duplicate", second.message_id)


def test_a_day_is_a_day_on_a_host_whose_clock_is_wrong(door: Door, ledger: MessageLedger) -> None:
    """The database's clock decides how long a key is known, whatever the receiving host's clock says, also on the
    duplicate path."""

    def wrong(content: bytes, **apart: float) -> Admitted:
        admitted = door.admit(content)
        head = structs.replace(admitted.inbound.head, received_at=door.now + timedelta(**apart))
        return structs.replace(admitted, inbound=structs.replace(admitted.inbound, head=head))

    ledger.accept(wrong(body(log=None, outside="Ada"), hours=-30)).result(10)
    assert ledger.accept(door.admit(body(log=None, outside="Ada"))).result(10).outcome == "duplicate"
    with stalled(door, ledger):
        repeat, fresh = [ledger.accept(wrong(body(log=None, outside=name), hours=30)) for name in ("Ada", "Bea")]
    assert [each.result(10).outcome for each in (repeat, fresh)] == ["duplicate", "unhandled"]
    assert door.value(
        "SELECT bool_and(expires_at BETWEEN now() + interval '23 h 50 min' AND now() + interval '1 d') "
        "FROM message_keys WHERE expires_at IS NOT NULL"
    )


def test_a_message_with_an_id_is_a_repeat_for_ever(door: Door, ledger: MessageLedger) -> None:
    """Its key does not expire."""
    ledger.accept(door.admit(body())).result(10)
    assert door.value("SELECT expires_at FROM message_keys") is None


def test_a_fhir_notification_with_an_id_is_a_repeat_for_ever(door: Door, ledger: MessageLedger) -> None:
    """A recording of it that is sent again, after whatever time, runs nothing."""
    header = {
        "resourceType": "MessageHeader",
        "id": "header",
        "eventUri": "a/PatientAdminCreated",
        "source": {"endpoint": SOURCE},
    }
    content = json.dumps(
        {"resourceType": "Bundle", "id": "bundle", "type": "message", "entry": [{"resource": header}]}
    ).encode()
    door.enable()
    first = ledger.accept(door.admit(content)).result(10)
    door.rows("UPDATE message_keys SET expires_at = now() - interval '1 second' WHERE expires_at IS NOT NULL")
    again = ledger.accept(door.admit(content)).result(10)
    assert (first.outcome, again.outcome, again.message_id) == ("accepted", "duplicate", first.message_id)


def test_a_query_is_nobodys_repeat(door: Door, ledger: MessageLedger) -> None:
    """Its asker waits for an answer each time; it is recorded each time, and waits for no handler."""
    door.enable()
    content = body(kind="PatientSearch.Query")
    receipts = [ledger.accept(door.admit(content)).result(10) for _ in range(2)]
    assert [receipt.outcome for receipt in receipts] == ["accepted", "accepted"]
    assert door.value("SELECT count(*) FROM messages WHERE query") == 2
    assert door.value("SELECT count(*) FROM message_keys") == door.value("SELECT count(*) FROM deliveries") == 0


def test_two_destinations_do_not_share_keys(door: Door, ledger: MessageLedger) -> None:
    """Two feeds may number alike."""
    first = door.admit(body())
    door.rows("UPDATE message_keys SET destination_id = destination_id")
    ledger.accept(first).result(10)
    door.rows("UPDATE message_keys SET destination_id = destination_id + 1")
    assert ledger.accept(door.admit(body())).result(10).outcome == "unhandled"


# --- quarantine's quota


def test_quarantine_holds_so_many_bytes_and_then_redox_must_keep_them(
    door: Door, open_ledger: Callable[..., MessageLedger]
) -> None:
    """Unavailable, not lost; what is fit to be dispatched goes on, and so does another destination."""
    ledger = open_ledger(quarantine_quota=10_000)
    assert ledger.accept(door.admit(b"x" * 6_000)).result(10).outcome == "quarantined"
    with pytest.raises(Unavailable, match="quarantine_full"):
        ledger.accept(door.admit(b"y" * 6_000)).result(10)
    assert ledger.accept(door.admit(b"z" * 3_000)).result(10).outcome == "quarantined"
    assert ledger.accept(door.admit(body())).result(10).outcome == "unhandled"
    assert door.value("SELECT sum(size) FROM messages WHERE state = 'quarantined'") == 9_000


def test_small_bodies_fill_quarantine_too(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """What a row takes counts, so that a flood of bodies of one byte ends; also for another process that looks."""
    for offset in (0, 1):
        ledger = open_ledger(quarantine_quota=4 * MIN_QUARANTINED_SIZE)
        for n in range(2):
            assert ledger.accept(door.admit(bytes([65 + 2 * offset + n]))).result(10).outcome == "quarantined"
    with pytest.raises(Unavailable, match="quarantine_full"):
        ledger.accept(door.admit(b"z")).result(10)


def test_what_an_operator_releases_makes_room(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """The sum is asked again after a few seconds. Guards the age in `Quota`."""
    ledger = open_ledger(quarantine_quota=3000)
    ledger.accept(door.admit(b"x" * 2900)).result(10)
    door.rows("UPDATE messages SET state = 'discarded'")
    content = door.admit(b"y" * 2900)

    def taken() -> bool:
        return ledger.accept(content).exception(10) is None

    assert not taken()
    until(taken, "room")


# --- refusals and handshakes


def test_a_refusal_is_in_the_audit_within_a_second(door: Door, ledger: MessageLedger) -> None:
    """The audit has the sender and the reason, but not the unread body, the token or a header's value.

    The second is what the writer's flush promises; a machine that is busy with other things may take longer.
    """
    assert _FLUSH_INTERVAL <= 0.5
    content = b"a body with a canary"
    ledger.refuse(door.refuse(content, token="a token that is the canary", authorization="Bearer canary"))
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'"), "the refusal")
    event = door.rows("SELECT * FROM audit_events WHERE action = 'message.refuse'")[0]
    assert (event.outcome, event.reason, event.actor, event.peer, event.destination, event._mapping["count"]) == (
        "refused",
        "token_wrong",
        "unverified",
        "192.0.2.1",
        DESTINATION,
        1,
    )
    assert json.loads(event.detail) == {"status": 401}
    assert "canary" not in str(event._asdict())


def test_an_unknown_source_is_named_when_it_is_shaped_like_an_id(door: Door, ledger: MessageLedger) -> None:
    """Anything else that is claimed may be anybody's data: a digest of it is kept. So it is of the body."""
    content = body("1", source="somebody-2")
    ledger.refuse(door.refuse(content))
    ledger.refuse(door.refuse(body("2", source="Ada Lovelace, born 1815")))
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'") == 2, "two refusals")
    details = [
        json.loads(row.detail)
        for row in door.rows("SELECT detail FROM audit_events WHERE action = 'message.refuse' ORDER BY n")
    ]
    digests = KeyedDigests(door.keyring)
    assert details[0] == {
        "status": 403,
        "source": "somebody-2",
        "source_digest": None,
        "length": len(content),
        "digest": digests.content(content).hex(),
    }
    assert (details[1]["source"], details[1]["source_digest"]) == (
        None,
        digests.source("Ada Lovelace, born 1815").hex(),
    )


def test_a_refused_query_is_told_from_a_refused_message(door: Door, ledger: MessageLedger) -> None:
    """Its asker does not come again: no feed stands still for it."""
    ledger.refuse(door.refuse(body("1", source="somebody-2", kind="PatientSearch.Query")))
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'"), "the refusal")
    assert json.loads(door.value("SELECT detail FROM audit_events WHERE action = 'message.refuse'"))["query"] is True


def test_a_handshake_is_in_the_audit_with_the_credential_that_vouched(door: Door, ledger: MessageLedger) -> None:
    """Neither the challenge nor the token is."""
    ledger.challenged(door.challenge())
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'destination.handshake'"), "a handshake")
    event = door.rows("SELECT * FROM audit_events WHERE action = 'destination.handshake'")[0]
    credential = door.value("SELECT id FROM credentials")
    assert (event.outcome, event.subject, event.detail) == ("answered", f"credentials:{credential}", None)


def test_a_flood_is_counted_exactly_and_not_a_row_each(door: Door, ledger: MessageLedger) -> None:
    """10,000 wrong tokens: some rows as they are, the rest summed up, all told when the process ends."""
    refusals = [door.refuse(b"", token="wrong " * 5, peer=f"198.51.100.{n}") for n in range(20)]
    for n in range(10_000):
        ledger.refuse(refusals[n % 20])
    ledger.stop()
    audited = door.rows("SELECT count(*), sum(count) FROM audit_events WHERE action = 'message.refuse'")[0]
    assert audited[1] == 10_000
    assert audited[0] <= 320
    proved(door)


def test_the_true_feed_is_recorded_during_a_flood(door: Door, ledger: MessageLedger) -> None:
    """And a flood of made-up sources is bounded like one of wrong tokens."""
    refused = [door.refuse(body(source=f"made-up-{n}")) for n in range(5)]
    for n in range(2_000):
        ledger.refuse(refused[n % 5])
        if n % 500 == 0:
            assert ledger.accept(door.admit(body(f"log-{n}"))).result(10).outcome == "unhandled"
    ledger.stop()
    audited = door.rows("SELECT count(*), sum(count) FROM audit_events WHERE action = 'message.refuse'")[0]
    assert audited[1] == 2_000
    assert audited[0] <= 20


# --- one audit row that somebody waits for


def test_an_audit_row_is_committed_when_its_future_is_done(door: Door, ledger: MessageLedger) -> None:
    """As the disclosure that goes before an answer; its note is sealed."""
    ledger.record(
        AuditEvent(action="message.disclose", outcome="answered", at=door.now, actor="redox", note="for Ada")
    ).result(10)
    event = door.rows("SELECT * FROM audit_events WHERE action = 'message.disclose'")[0]
    assert b"Ada" not in event.note
    assert Sealer(door.keyring).open(event.note_key, event.note, f"audit:{event.writer}:{event.n}") == b"for Ada"
    proved(door)


# --- last used


def test_when_a_credential_was_last_used_is_written_at_the_latest_when_the_process_ends(
    door: Door, ledger: MessageLedger
) -> None:
    """The newest time; an older one, of another process, does not overwrite it."""
    admitted = door.admit(body())
    ledger.accept(admitted).result(10)
    ledger.stop()
    assert door.value("SELECT last_used_at FROM credentials") == admitted.inbound.head.received_at


def test_a_last_use_never_goes_back(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """Two processes write in any order."""
    ledgers = [open_ledger(), open_ledger()]
    older, newer = door.admit(body("1")), door.admit(body("2"))
    ledgers[0].accept(newer).result(10)
    ledgers[1].accept(older).result(10)
    for ledger in ledgers:
        ledger.stop()
    assert door.value("SELECT last_used_at FROM credentials") == newer.inbound.head.received_at


# --- the end


def test_what_waits_is_written_before_the_end(door: Door, ledger: MessageLedger, keyring: Keyring) -> None:
    """SIGTERM under load loses no accepted message, and later requests are refused."""
    futures = [ledger.accept(door.admit(body(f"log-{n}"))) for n in range(150)]
    ledger.stop()
    assert [future.result(0).outcome for future in futures] == ["unhandled"] * 150
    with pytest.raises(Unavailable, match="shutting_down"):
        ledger.accept(door.admit(body("late"))).result(0)
    with pytest.raises(Unavailable, match="shutting_down"):
        ledger.record(AuditEvent(action="a.b", outcome="c", at=door.now, actor="d")).result(0)
    assert door.value("SELECT count(*) FROM messages") == 150
