"""FHIR AuditEvents: every action has valid codes, and what may not be passed on is not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from fhir.resources.R4B.auditevent import AuditEvent as FhirAuditEvent

from receiver.storage.operations.fhir_audit_event import fhir_audit_event

LOG = UUID("0197a3c4-5b1e-7c52-9d0a-3f6a2b1c4d5e")
WRITER = UUID("0197a3c4-5b1e-7c52-9d0a-000000000001")


def event(**changes: Any) -> dict[str, Any]:
    """Return the AuditEvent of a row, which is valid FHIR."""
    row = {
        "log_index": 41,
        "id": 7,
        "writer": WRITER,
        "n": 3,
        "at": datetime(2026, 1, 31, 8, tzinfo=UTC),
        "action": "message.receive",
        "outcome": "accepted",
        "reason": None,
        "actor": "redox",
        "peer": "192.0.2.1",
        "destination": "clinic",
        "message_uuid": UUID("0197a3c4-5b1e-7c52-9d0a-000000000002"),
        "subject": None,
        "count": 1,
        "detail": {"to": "a detail that stays here"},
        "follows": None,
        "noted": False,
    }
    made = fhir_audit_event(row | changes, LOG)
    FhirAuditEvent.model_validate(made)
    assert "stays here" not in str(made)
    return made


@pytest.mark.parametrize(
    ("action", "type_", "subtype", "code"),
    [
        ("message.receive", "110107", "receive", "C"),
        ("message.refuse", "110113", "110126", "E"),
        ("message.disclose", "110106", "disclose", "R"),
        ("query.answer", "110112", "disclose", "E"),
        ("outbound.send", "110106", "transmit", "R"),
        ("audit.disclose", "110101", "audit.disclose", "R"),
        ("audit.export", "110101", "audit.export", "R"),
        ("credential.add", "110113", "110129", "C"),
        ("credential.revoke", "110113", "110129", "U"),
        ("delivery.retry", "110100", "delivery.retry", "E"),
    ],
)
def test_codes(action: str, type_: str, subtype: str, code: str) -> None:
    """Type, first subtype and action; the last subtype is our own action."""
    made = event(action=action)
    assert (made["type"]["code"], made["subtype"][0]["code"], made["action"]) == (type_, subtype, code)
    assert made["subtype"][-1]["code"] == action


@pytest.mark.parametrize(
    ("outcome", "code"), [("done", "0"), ("quarantined", "0"), ("refused", "4"), ("failed", "4"), ("unavailable", "8")]
)
def test_outcomes(outcome: str, code: str) -> None:
    """Success, minor failure, serious failure; the text has the word itself."""
    made = event(outcome=outcome, reason="why", count=3)
    assert (made["outcome"], made["outcomeDesc"]) == (code, f"{outcome} (why), 3 events")


def test_who_acted() -> None:
    """A sender with its address, an operator, and a process; the destination is an agent that asked for nothing."""
    sender, destination = event()["agent"]
    assert sender["network"] == {"address": "192.0.2.1", "type": "2"}
    assert (sender["requestor"], destination["requestor"]) == (True, False)
    assert destination["who"]["identifier"]["value"] == "clinic"
    (operator,) = event(actor="alice@ops uid=7", destination=None, peer=None)["agent"]
    assert operator["type"]["coding"][0]["code"] == "humanuser"
    assert operator["who"] == {"identifier": {"value": "alice@ops"}, "display": "alice@ops uid=7"}
    (worker,) = event(actor="worker:w1", destination=None, peer="unix:")["agent"]
    assert worker["type"]["coding"][0]["code"] == "dataprocessor"
    assert "network" not in worker


def test_the_row_can_be_found_again() -> None:
    """The id is the row's, and its source names the log and the index in it."""
    made = event()
    assert made["id"] == event(outcome="duplicate")["id"] != event(n=4)["id"]
    assert made["meta"]["source"] == f"urn:uuid:{LOG}#41"
    assert event(subject="deliveries:12")["entity"][1]["what"]["identifier"]["value"] == "deliveries:12"
    assert "entity" not in event(message_uuid=None)
    assert "purposeOfEvent" not in made
    assert event(reason="break_glass")["purposeOfEvent"][0]["coding"][0]["code"] == "BTG"
