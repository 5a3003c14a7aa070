"""`audit report --patient`: who touched a patient, recorded before it is shown, and what it cannot cover."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.queue.maintenance import claim_unindexed, index_patients
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import SOURCE, Door, body
from tests.storage.hand import Hand, arrive

WHY = ("--reason", "request 4711")
OTHER = "22222222-2222-4222-8222-222222222222"
MRN = "MRN-90210"
SYSTEM = "urn:oid:1.2.3"


def index(door: Door) -> None:
    """Index the patients of all messages, as a worker does."""
    with door.engine.begin() as connection:
        claimed = claim_unindexed(connection, without=())
    with door.engine.begin() as connection:
        index_patients(connection, Sealer(door.keyring), KeyedDigests(door.keyring), claimed)


def record(door: Door, *events: AuditEvent) -> None:
    """Write audit rows."""
    with door.engine.begin() as connection:
        write(connection, AuditChain(door.keyring, Sealer(door.keyring)), events)


def report(run: Commands, *lines: str) -> Any:
    """Return the report of the patient with these lines."""
    return run.json("audit", "report", "--patient", *WHY, stdin="".join(f"{line}\n" for line in lines))


def events(found: Any) -> list[tuple[str, str, str]]:
    """Return event, actor and outcome of each."""
    return [(each["event"], each["actor"], each["outcome"]) for each in found["events"]]


@pytest.fixture
def messages(door: Door, ledger: MessageLedger) -> tuple[int, int]:
    """A message of the patient that a handler has run, and one of another patient. Returns their ids."""
    door.enable()
    one, other = arrive(door, ledger, body("1", outside=MRN), body("2", outside="MRN-7"))
    index(door)
    hand = Hand(door.engine).take()
    hand.succeed(2)
    hand.leave()
    return one, other


def test_who_touched_the_patient(messages: tuple[int, int], door: Door, ledger: MessageLedger, run: Commands) -> None:
    """Received, handled, viewed, answered, sent and received again, oldest first, and of this patient alone."""
    for number in messages:
        run("messages", "show", str(number), "--payload", *WHY)
    uuid = door.value("SELECT uuid FROM messages WHERE id = :id", id=messages[0])
    door.rows(
        "INSERT INTO outbound_requests "
        "(id, uuid, api_key, lane, call, kind, message_uuid, created_by, state, attempts) "
        "OVERRIDING SYSTEM VALUE "
        "VALUES (9, gen_random_uuid(), 'lab', '@outbox/lab/x', 'send', 'Notes.New', :uuid, 'handler:register', "
        "'sent', 1)",
        uuid=uuid,
    )
    shared: dict[str, Any] = {"at": door.now, "destination": "clinic", "message_uuid": uuid}
    record(
        door,
        AuditEvent(
            action="outbound.send",
            outcome="begun",
            actor="handler:register",
            subject="outbound_requests:9",
            detail={"to": ["registry-1"]},
            **shared,
        ),
        AuditEvent(action="query.answer", outcome="answered", actor="redox", detail={"responder": "search"}, **shared),
    )
    ledger.accept(door.admit(body("1", outside=MRN))).result(30)
    found = report(run, MRN, "MR")
    assert sorted(events(found)) == sorted(
        [
            ("received", f"source:{SOURCE}", "accepted"),
            ("handled", "handler:register", "succeeded"),
            ("viewed", ACTOR, "disclosed"),
            ("answered", "handler:search", "answered"),
            ("sent", "handler:register", "sent"),
            ("received", f"source:{SOURCE}", "duplicate"),
        ]
    )
    times = [each["at"] for each in found["events"]]
    assert times == sorted(times)
    assert {each["message_id"] for each in found["events"]} == {messages[0]}
    recipients = {each["event"]: each["recipient"] for each in found["events"]}
    assert (recipients["sent"], recipients["answered"]) == ("registry-1", f"source:{SOURCE}")


def test_every_attempt_is_there(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """Also those before `deliveries retry`, which is itself there, and one that runs now."""
    door.enable()
    arrive(door, ledger, body("1", outside=MRN))
    index(door)
    failed = Hand(door.engine).take().fail()
    run("deliveries", "retry", str(failed), *WHY)
    Hand(door.engine).take().begin()
    assert events(report(run, MRN, "MR"))[1:] == [
        ("handled", "handler:register", "failed"),
        ("delivery.retry", ACTOR, "pending"),
        ("handled", "handler:register", "running"),
    ]


def test_a_report_is_a_disclosure(messages: tuple[int, int], door: Door, run: Commands) -> None:
    """Its row is sealed, names the reader and a keyed digest, and the next report and a review show it."""
    first = report(run, MRN, "MR")
    (row,) = run.json("audit", "list", "--action", "audit.report")
    assert (row["actor"], row["outcome"], row["reason"]) == (ACTOR, "disclosed", "break_glass")
    digest = KeyedDigests(door.keyring).patient(None, "MR", MRN).hex()
    assert row["detail"] == {"patient": digest, "messages": 1, "events": len(first["events"])}
    assert door.value(
        "SELECT EXISTS (SELECT FROM audit_seal_writers s JOIN audit_events e "
        "ON e.writer = s.writer AND e.n BETWEEN s.first_n AND s.last_n WHERE e.action = 'audit.report')"
    )
    assert ("viewed", ACTOR, "disclosed") in events(report(run, MRN, "MR", SOURCE))
    assert ("viewed", ACTOR, "disclosed") not in events(report(run, "MRN-7", "MR"))
    assert ("disclosure", "audit.report") in {(each["about"], each["action"]) for each in run.json("audit", "review")}
    noted = run.json("audit", "list", "--action", "audit.report", "--notes", *WHY)
    assert {each["note"] for each in noted} == {"request 4711"}
    assert run.json("audit", "verify")["first_bad"] is None


def test_the_identifier_stays_where_it_is(messages: tuple[int, int], door: Door, run: Commands) -> None:
    """It is in no output and in no audit row, also if stdin is wrong; then nothing is recorded."""
    done = run("audit", "report", "--patient", *WHY, stdin=f"{MRN}\nMR\n")
    assert "received" in done.stdout
    assert "This report does not cover:" in done.stderr
    assert MRN not in done.output
    assert not door.rows("SELECT FROM audit_events e WHERE e::text LIKE :text", text=f"%{MRN}%")
    before = door.value("SELECT count(*) FROM audit_events")
    for stdin in (f"{MRN}\n", "\nMR\n", f"{MRN}\nMR\n{SOURCE}\nmore\n", ""):
        assert MRN not in run.fails("audit", "report", "--patient", *WHY, stdin=stdin, status=2)
    assert "--reason" in run.fails("audit", "report", "--patient", stdin=f"{MRN}\nMR\n", status=2)
    assert "--patient" in run.fails("audit", "report", *WHY, stdin=f"{MRN}\nMR\n", status=2)
    assert "stdin" in run.fails("audit", "report", "--patient", "--reason", "-", stdin=f"{MRN}\nMR\n", status=2)
    assert door.value("SELECT count(*) FROM audit_events") == before


def test_one_identifier_of_several_sources(
    messages: tuple[int, int], door: Door, ledger: MessageLedger, run: Commands
) -> None:
    """Without an authority all are shown, with a warning; with one, its messages alone."""
    run("source", "add", "clinic", OTHER)
    (third,) = arrive(door, ledger, body("3", outside=MRN, source=OTHER))
    index(door)
    found = report(run, MRN, "MR")
    assert {each["message_id"] for each in found["events"]} == {messages[0], third}
    assert any("several sources" in each for each in found["not_covered"])
    found = report(run, MRN, "MR", OTHER)
    assert {each["message_id"] for each in found["events"]} - {None} == {third}
    assert not any("several sources" in each for each in found["not_covered"])
    assert report(run, MRN, "NI", OTHER)["events"] == []


@pytest.mark.parametrize("type_", ["MR", ""])
def test_an_authority_of_its_own(type_: str, door: Door, ledger: MessageLedger, run: Commands) -> None:
    """FHIR's identifier.system; an identifier without a type was indexed under its system."""
    (number,) = arrive(door, ledger, body("1", outside="MRN-7"))
    index(door)
    door.rows(
        "INSERT INTO patient_digests (digest, message_id, received_at) SELECT :digest, id, received_at FROM messages",
        digest=KeyedDigests(door.keyring).patient(SYSTEM, type_ or SYSTEM, MRN),
    )
    assert {each["message_id"] for each in report(run, MRN, type_, SYSTEM)["events"]} == {number}
    found = report(run, MRN, type_)
    assert {each["message_id"] for each in found["events"]} == {None}  # the report before
    assert any("identifier.system" in each for each in found["not_covered"])


def test_what_it_cannot_cover(messages: tuple[int, int], door: Door, ledger: MessageLedger, run: Commands) -> None:
    """Messages that are not indexed or unreadable, and payloads that are purged, are counted or dated."""

    def missing() -> str:
        return "\n".join(report(run, MRN, "MR")["not_covered"])

    nothing = missing()
    assert not [word for word in ("not indexed", "unreadable", "purged") if word in nothing]
    arrive(door, ledger, body("3", outside=MRN), b"no json")
    assert "1 messages are not indexed yet" in missing()
    assert "1 messages are unreadable" in missing()
    door.rows("DELETE FROM payloads WHERE message_id = :id", id=messages[0])
    assert "payloads are purged up to 20" in missing()
    door.rows("DELETE FROM payloads")
    assert "payloads are purged: " in missing()
