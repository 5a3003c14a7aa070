"""What the verbs of the ledger write."""

from __future__ import annotations

from hashlib import sha256

from receiver.storage.ledger import Ledger
from tests.storage.door import Door, body


def test_an_accepted_message_is_there_whole_when_the_receipt_comes(door: Door, ledger: Ledger) -> None:
    """Message, payload, delivery and audit row are committed before the future is done."""
    door.enable()
    content = body()
    receipt = ledger.accept(door.admit(content)).result(10)
    assert receipt.outcome == "accepted"
    row = door.rows("SELECT * FROM messages")[0]
    assert (row.id, str(row.uuid)) == (receipt.message_id, receipt.uuid)
    assert (row.sha256, row.size, row.kind, row.state) == (
        sha256(content).digest(), len(content), "PatientAdmin.Arrival", "accepted")
