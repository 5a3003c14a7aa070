"""Background tasks of a worker: the patient index and heartbeats."""

from __future__ import annotations

from tests.support.waiting import until
from tests.worker.world import World


def test_patients_are_indexed(working: World, place: str) -> None:
    """The patient identifiers of every message are digested, handled or not; an unreadable message counts as
    indexed.
    """
    sent = working.hand("nothing", destination=place, patient="4711")
    [message] = [each.message_id for each in sent.receipts]
    until(lambda: working.rows("SELECT FROM patient_digests WHERE message_id = :id", id=message), "it is indexed")

    until(lambda: not working.rows("SELECT FROM messages WHERE patients_indexed_at IS NULL"), "all are indexed")


def test_heartbeat(working: World) -> None:
    """A worker records its host, its handlers, and that it is alive."""
    [row] = until(lambda: working.rows("SELECT * FROM workers"), "it has said so")
    assert row["pid"] == working.processes[0].pid
    assert {"scripted", "within", "by-patient"} <= set(row["handlers"])
    assert "search" not in row["handlers"]  # responders run in the receiver
