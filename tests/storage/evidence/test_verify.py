"""What is edited, inserted, reordered or deleted is found and named; what is not, is not."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import Engine

from receiver.keyring import Keyring, create
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.verify import VerificationResult, verify
from tests.storage.door import Door, body, handler


@pytest.fixture
def stored(door: Door, ledger: MessageLedger) -> Door:
    """A registry of one each, six messages of one writer, and audit rows that nothing protects any more."""
    door.enable(handler())
    for n in range(6):
        ledger.accept(door.admit(body(f"log-{n}"))).result(10)
    ledger.stop()
    door.rows("ALTER TABLE audit_events DISABLE TRIGGER USER")
    return door


def prove(door: Door, *, payloads: bool = False, keyring: Keyring | None = None) -> VerificationResult:
    with door.engine.connect() as connection:
        return verify(connection, keyring or door.keyring, payloads=payloads)


def bad(door: Door, *, payloads: bool = False) -> str:
    """What is the first that does not hold."""
    found = prove(door, payloads=payloads).first_bad
    assert found is not None
    return found


def row(door: Door, n: int) -> tuple[int, UUID]:
    """(id, writer) of the ledger's audit row number `n`."""
    found = door.rows("SELECT id, writer FROM audit_events WHERE n = :n AND action = 'message.receive'", n=n)[0]
    return found.id, found.writer


def test_what_nobody_touched_holds(stored: Door) -> None:
    """Every row is read, of every table whose rows are signed."""
    proof = prove(stored, payloads=True)
    signed = sum(
        stored.value(f"SELECT count(*) FROM {table}")
        for table in ("audit_events", "messages", "payloads", "destinations", "credentials", "sources", "subscriptions")
    )
    assert proof == VerificationResult(rows=signed, writers=2, first_bad=None)
    assert prove(stored).rows == signed - 6


def test_an_empty_database_holds(engine: Engine, keyring: Keyring) -> None:
    """There is nothing to doubt."""
    with engine.connect() as connection:
        assert verify(connection, keyring, payloads=True) == VerificationResult(rows=0, writers=0, first_bad=None)


@pytest.mark.parametrize(
    "edit",
    [
        "at = at + interval '1 microsecond'",
        "outcome = 'refused'",
        "reason = ''",
        "actor = 'somebody'",
        "peer = NULL",
        "destination = 'ward'",
        "message_uuid = gen_random_uuid()",
        "subject = ''",
        "count = 2",
        "detail = detail || ' '",
        "note = ''::bytea",
        "note_key = ''",
        "mac = sha256(mac)",
        "action = 'message.received'",
    ],
)
def test_an_edited_audit_row_is_found(stored: Door, edit: str) -> None:
    """Whichever column it was: the row is named, by writer, number and id."""
    number, writer = row(stored, 4)
    stored.rows(f"UPDATE audit_events SET {edit} WHERE id = {number}")
    assert bad(stored) == (f"audit_events writer {writer}, n 4, id {number}: edited, or inserted without the key")


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_deleted_audit_row_is_found(stored: Door, n: int) -> None:
    """The first and any in the midst: the gap is named, and what comes after it."""
    number, writer = row(stored, n)
    after = row(stored, n + 1)[0]
    stored.rows(f"DELETE FROM audit_events WHERE id = {number}")
    assert bad(stored) == f"audit_events writer {writer}, n {n}: deleted; the next one is n {n + 1}, id {after}"


def test_a_message_without_its_audit_row_is_found(stored: Door) -> None:
    """The last rows of a chain were deleted, and their message was not."""
    number, _ = row(stored, 6)
    stored.rows(f"DELETE FROM audit_events WHERE id >= {number} AND action = 'message.receive'")
    message = stored.value("SELECT max(id) FROM messages")
    assert bad(stored) == f"messages id {message}: no audit row says that it was recorded; that row was deleted"


def test_the_last_rows_can_be_deleted_with_their_messages(stored: Door) -> None:
    """Nothing outside of the database has gathered the last head: this is what the proof does not claim."""
    number, _ = row(stored, 6)
    stored.rows("DELETE FROM messages WHERE uuid = (SELECT message_uuid FROM audit_events WHERE id = :id)", id=number)
    stored.rows("DELETE FROM audit_events WHERE id = :id", id=number)
    assert prove(stored).first_bad is None


def test_a_chain_of_one_row_is_missed_when_another_follows(stored: Door) -> None:
    """Each command is a writer of its own: its first row names the newest row there was, so that neither can vanish."""
    deleted, kept = (_command(stored, at) for at in ("first", "second"))
    writer = stored.value("SELECT writer FROM audit_events WHERE id = :id", id=kept)
    assert prove(stored).first_bad is None
    stored.rows("DELETE FROM audit_events WHERE id = :id", id=deleted)
    assert bad(stored) == f"audit_events id {deleted}: deleted; the chain of writer {writer} follows it"


@pytest.mark.parametrize("edit", ["follows = NULL", "follows = follows - 1", "n = 2"])
def test_a_chain_that_is_hung_elsewhere_is_found(stored: Door, edit: str) -> None:
    """Deleting a row and letting the next chain follow another one requires the key."""
    number = _command(stored, "first")
    stored.rows(f"UPDATE audit_events SET {edit} WHERE id = {number}")
    assert bad(stored).startswith("audit_events ")


def _command(door: Door, actor: str) -> int:
    """One audit row of a writer of its own; its id."""
    with door.engine.begin() as connection:
        write(
            connection,
            AuditChain(door.keyring, Sealer(door.keyring)),
            [AuditEvent(action="a.b", outcome="done", at=datetime.now(UTC), actor=actor)],
        )
    return int(door.value("SELECT max(id) FROM audit_events"))


def test_reordered_audit_rows_are_found(stored: Door) -> None:
    """Two that changed their numbers: the first of the two is named."""
    (two, writer), (four, _) = row(stored, 2), row(stored, 4)
    stored.rows(f"UPDATE audit_events SET n = 99 WHERE id = {two}")
    stored.rows(f"UPDATE audit_events SET n = 2 WHERE id = {four}")
    stored.rows(f"UPDATE audit_events SET n = 4 WHERE id = {two}")
    assert bad(stored) == f"audit_events writer {writer}, n 2, id {four}: reordered"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("inside", "inserted; that number exists already"),
        ("at the end", "inserted without the key"),
        ("as a writer", "inserted without the key"),
    ],
)
def test_an_inserted_audit_row_is_found(stored: Door, where: str, why: str) -> None:
    """Without the key nobody makes a row that holds, be it a copy of one that does."""
    copied, writer = row(stored, 3)
    columns = (
        "at, action, outcome, reason, actor, peer, destination, message_uuid, subject, count, detail, mac, mac_key"
    )
    if where == "inside":
        stored.rows("ALTER TABLE audit_events DROP CONSTRAINT uq_audit_events_writer_n_at")
    place = {"inside": f"'{writer}', 3", "at the end": f"'{writer}', 7", "as a writer": "gen_random_uuid(), 1"}[where]
    stored.rows(
        f"INSERT INTO audit_events (writer, n, {columns}) SELECT {place}, {columns} "
        f"FROM audit_events WHERE id = {copied}"
    )
    assert bad(stored).endswith(why)


def test_a_row_of_another_writer_does_not_fit(stored: Door) -> None:
    """A chain is not put together from pieces of others."""
    number, writer = row(stored, 6)
    stored.rows(f"DELETE FROM audit_events WHERE id = {number}")
    last = stored.value(
        "UPDATE audit_events SET n = 6, writer = :writer WHERE action = 'handler.enable' RETURNING id", writer=writer
    )
    assert bad(stored).startswith(f"audit_events writer {writer}, n 6, id {last}: ")


@pytest.mark.parametrize(
    "edit",
    [
        "uuid = gen_random_uuid()",
        "destination_id = destination_id + 1",
        "credential_ids = '{}'",
        "source_id = 'x'",
        "kind = 'A.B'",
        "query = true",
        "test = true",
        "log_id = 'x'",
        "attempt_id = NULL",
        "message_id = 'x'",
        "transmission_id = 'x'",
        "facility = 'x'",
        "event_time = now()",
        "received_at = now()",
        "peer = ''",
        "digest = sha256(digest)",
        "size = size + 1",
        "content_type = NULL",
        "mac = sha256(mac)",
        "mac_key = 'x'",
    ],
)
def test_an_edited_message_is_found(stored: Door, edit: str) -> None:
    """Whichever of the columns that never change."""
    number = stored.value("SELECT max(id) FROM messages")
    stored.rows(f"UPDATE messages SET {edit} WHERE id = {number}")
    assert bad(stored).startswith((f"messages id {number}: ", "messages uuid"))


@pytest.mark.parametrize("change", ["state = 'discarded'", "quarantine_reason = 'x'", "patients_indexed_at = now()"])
def test_what_changes_by_itself_is_no_fault(stored: Door, change: str) -> None:
    """A message's state is work, not evidence; so is a pause, and when a credential was last used."""
    stored.rows(f"UPDATE messages SET {change}")
    stored.rows("UPDATE subscriptions SET paused_at = now(), pause_reason = 'x'")
    stored.rows("UPDATE credentials SET last_used_at = now()")
    assert prove(stored).first_bad is None


def test_a_deleted_message_is_found_by_its_audit(stored: Door) -> None:
    """Message rows are kept for good, so one that is audited and not there was deleted."""
    uuid = stored.value("SELECT message_uuid FROM audit_events WHERE id = :id", id=row(stored, 3)[0])
    stored.rows("DELETE FROM messages WHERE uuid = :uuid", uuid=uuid)
    assert bad(stored) == f"messages uuid {uuid}: deleted; its recording is audited by writer {row(stored, 3)[1]}, n 3"


@pytest.mark.parametrize(
    ("table", "edit"),
    [
        ("destinations", "require = '{}'"),
        ("destinations", "sources_policy = 'any'"),
        ("destinations", "enabled = false"),
        ("credentials", "expires_at = now()"),
        ("credentials", "digest = sha256(digest)"),
        ("credentials", "label = 'x'"),
        ("sources", "source_id = NULL"),
        ("sources", "name = 'x'"),
        ("subscriptions", "patterns = '{}'"),
        ("subscriptions", "timeout = 1"),
        ("subscriptions", "max_attempts = 1"),
    ],
)
def test_an_edited_registry_row_is_found(stored: Door, table: str, edit: str) -> None:
    """Credentials, sources and subscriptions are signed too."""
    number = stored.value(f"UPDATE {table} SET {edit} RETURNING id")
    assert bad(stored) == f"{table} id {number}: edited, or inserted without the key"


def test_a_payload_that_was_changed_or_moved_is_found(stored: Door) -> None:
    """Sealed to its message: what another's message row points to does not open."""
    first, second = (
        each.message_id for each in stored.rows("SELECT message_id FROM payloads ORDER BY message_id LIMIT 2")
    )
    stored.rows(f"UPDATE payloads SET message_id = -1 WHERE message_id = {first}")
    stored.rows(f"UPDATE payloads SET message_id = {first} WHERE message_id = {second}")
    stored.rows(f"UPDATE payloads SET message_id = {second} WHERE message_id = -1")
    stored.rows("UPDATE payloads p SET received_at = m.received_at FROM messages m WHERE m.id = p.message_id")
    assert prove(stored).first_bad is None
    assert bad(stored, payloads=True).startswith(f"payloads message_id {first}: the data sealed to payload:")


def test_a_payload_of_no_message_is_found(stored: Door) -> None:
    """Somebody put it there."""
    number = stored.value(
        "UPDATE payloads SET message_id = 10000 WHERE message_id = (SELECT max(id) FROM messages) RETURNING message_id"
    )
    assert bad(stored, payloads=True) == f"payloads message_id {number}: there is no such message"


def test_a_body_that_is_not_the_messages_is_found(stored: Door) -> None:
    """By somebody who has the payload key, and not the key of the MACs."""
    message = stored.rows("SELECT id, uuid FROM messages ORDER BY id LIMIT 1")[0]
    key, sealed = Sealer(stored.keyring).seal_body(b"another", f"payload:{message.uuid}")
    stored.rows(
        "UPDATE payloads SET payload_key = :key, sealed = :sealed WHERE message_id = :id",
        key=key,
        sealed=sealed,
        id=message.id,
    )
    assert bad(stored, payloads=True) == f"payloads message_id {message.id}: does not match the message's digest"


def test_purged_payloads_are_no_fault(stored: Door) -> None:
    """They go with their partition, the message row stays."""
    stored.rows("DELETE FROM payloads")
    assert prove(stored, payloads=True).first_bad is None


def test_a_keyring_that_lacks_the_key_is_named(stored: Door) -> None:
    """Not a change of the row: the operator has the wrong file."""
    found = prove(stored, keyring=create(datetime.now(UTC))).first_bad
    assert found is not None
    assert found.endswith(f"signed with key {stored.keyring.current('mac').id}, which this keyring lacks")


def test_rows_signed_with_an_older_key_still_hold(stored: Door) -> None:
    """A new key of the MACs is for new rows."""
    assert prove(stored, keyring=stored.keyring.with_new("mac", datetime.now(UTC))).first_bad is None


def test_nothing_of_a_rows_content_is_told(stored: Door) -> None:
    """The proof is printed and mailed about."""
    stored.rows("UPDATE messages SET log_id = 'canary', source_id = 'canary'")
    assert "canary" not in bad(stored)


def test_many_rows_are_read_a_few_at_a_time(engine: Engine, keyring: Keyring) -> None:
    """More than one fetch of the server's cursor, over whose edges the chain goes on. The caller's reads stay plain."""
    chain = AuditChain(keyring, Sealer(keyring))
    now = datetime.now(UTC)
    with engine.begin() as connection:
        write(connection, chain, [AuditEvent(action="a.b", outcome="c", at=now, actor="d")] * 2_500)
        assert verify(connection, keyring) == VerificationResult(rows=2_500, writers=1, first_bad=None)
        assert connection.get_execution_options().get("yield_per") is None


def test_writing_goes_on_meanwhile(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """What is committed while rows are read is never taken for a gap."""
    ledger = open_ledger()

    def sent() -> Iterator[VerificationResult]:
        for n in range(30):
            futures = [ledger.accept(door.admit(body(f"{n}-{k}"))) for k in range(3)]
            yield prove(door, payloads=True)
            for future in futures:
                future.result(10)

    assert {proof.first_bad for proof in sent()} == {None}


def test_a_large_body_is_proved_too(door: Door, ledger: MessageLedger) -> None:
    """Bytes that do not compress, more than a page or a packet."""
    ledger.accept(door.admit(os.urandom(3_000_000))).result(10)
    ledger.accept(door.admit(body(outside=secrets.token_hex(1_000_000)))).result(10)
    assert prove(door, payloads=True).first_bad is None
