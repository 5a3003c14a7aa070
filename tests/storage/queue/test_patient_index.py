"""The patient index: which messages are indexed when, also if indexing ends the worker."""

from __future__ import annotations

from msgspec.structs import replace

from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.queries import MessageFilter
from receiver.storage.queue.maintenance import claim_unindexed, index_patients
from tests.storage.door import SOURCE, Door, body


def claim(door: Door) -> list[int]:
    """Claim what is due, and commit."""
    with door.engine.begin() as connection:
        return claim_unindexed(connection, without=())


def index(door: Door, claimed: list[int], keyring: Keyring | None = None) -> list[int]:
    """Index what was claimed, and commit. Returns the messages that did not open."""
    with door.engine.begin() as connection:
        return index_patients(connection, Sealer(keyring or door.keyring), KeyedDigests(door.keyring), claimed)


def arrive(door: Door, ledger: MessageLedger, *contents: bytes) -> list[int]:
    return [ledger.accept(door.admit(content)).result(10).message_id for content in contents]


def indexed(door: Door, message: int, patient: str) -> bool:
    """Return whether the message is found by this medical record number."""
    return bool(
        door.rows(
            "SELECT FROM patient_digests WHERE message_id = :id AND digest = :digest",
            id=message,
            digest=KeyedDigests(door.keyring).patient(SOURCE, "MR", patient),
        )
    )


def test_what_is_claimed_is_indexed_once(door: Door, ledger: MessageLedger) -> None:
    """All messages are claimed together, once; no attempt is left."""
    ids = arrive(door, ledger, body("1", outside="Ada"), body("2", outside="Bea"))
    claimed = claim(door)
    assert sorted(claimed) == ids
    assert claim(door) == []  # another worker has it in hand
    assert index(door, claimed) == []
    assert indexed(door, ids[0], "Ada")
    assert indexed(door, ids[1], "Bea")
    assert claim(door) == door.rows("SELECT FROM patient_index_attempts") == []


def test_what_ends_the_worker_is_claimed_alone_and_ever_later(door: Door, ledger: MessageLedger) -> None:
    """The attempt is committed before the body is opened, so that a restarted worker does not repeat what ended the
    last one.
    """
    ids = arrive(door, ledger, body("1"), body("2"))
    claim(door)  # and here the process is killed
    later = arrive(door, ledger, body("3"))
    assert claim(door) == later
    index(door, later)

    def after(interval: str) -> list[int]:
        door.rows(f"UPDATE patient_index_attempts SET attempted_at = attempted_at - interval '{interval}'")
        return claim(door)

    assert after("61 seconds") == ids[:1]
    index(door, ids[:1])
    assert claim(door) == ids[1:]  # killed again
    assert after("2 minutes") == []
    assert after("1 hour") == ids[1:]
    assert after("2 hours") == []
    assert after("1 day") == ids[1:]
    assert after("2 hours") == []
    index(door, ids[1:])
    assert indexed(door, ids[1], "Ada")
    assert door.rows("SELECT FROM patient_index_attempts") == []


def test_large_bodies_are_claimed_apart(door: Door, ledger: MessageLedger) -> None:
    """Only some large bodies are opened in one transaction."""
    ids = arrive(door, ledger, *(body(str(n)) for n in range(3)))
    door.rows("UPDATE messages SET size = 20 * 1024 * 1024")
    assert sorted(claim(door)) == ids[:2]
    assert claim(door) == ids[2:]


def test_what_does_not_open_here_is_left_to_other_hosts(door: Door, ledger: MessageLedger) -> None:
    """A payload that does not open stays unindexed, and other hosts can claim it at once."""
    ids = arrive(door, ledger, body("1"))
    door.rows("UPDATE payloads SET payload_key = 'unknown'")
    assert index(door, claim(door)) == ids
    with door.engine.begin() as connection:
        assert claim_unindexed(connection, without=ids) == []
    assert claim(door) == ids


def test_what_cannot_be_read_is_not_called_indexed(door: Door, ledger: MessageLedger) -> None:
    """An unreadable payload is tried again later."""
    [message] = arrive(door, ledger, b"not JSON")
    door.rows("UPDATE messages SET kind = 'PatientAdmin.Arrival'")
    assert index(door, claim(door)) == []
    assert door.value("SELECT patients_indexed_at FROM messages") is None
    assert door.value("SELECT message_id FROM patient_index_attempts") == message


def test_a_message_that_was_unreadable_is_indexed_when_it_is_released(door: Door, ledger: MessageLedger) -> None:
    """A message that was unreadable is indexed again after its release."""
    unread = replace(door.admit(body("1")), message=None, quarantine="too_deep")  # as an older release judged it
    message = ledger.accept(unread).result(10).message_id
    index(door, claim(door))
    assert door.value("SELECT patients_indexed_at FROM messages") is not None
    assert not indexed(door, message, "Ada")

    work = MessageCorrections(door.engine, door.keyring, actor="someone@here").release(
        MessageFilter(ids=(message,)), door.now, reason="it is read now"
    )
    assert [batch.done for batch in work.batches] == [(message,)]
    index(door, claim(door))
    assert indexed(door, message, "Ada")
