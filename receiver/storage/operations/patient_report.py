"""The report of a patient: who touched the messages that name one identifier, after its audit row is sealed.

Must not store, log or return the identifier: the audit row holds its keyed digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine

from receiver.keyring import Keyring
from receiver.protocol.patients import PatientIdentifier
from receiver.storage.evidence.audit_log import BREAK_GLASS, AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations.queries.patient_queries import message_sources, oldest_payload, touched


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientReport:
    """What happened, oldest first, and sentences about what the report cannot cover."""

    events: list[dict[str, Any]]
    not_covered: list[str] = field(default_factory=list)


def report_patient(
    engine: Engine, keyring: Keyring, patient: PatientIdentifier, now: datetime, *, actor: str, reason: str
) -> PatientReport:
    """Return the report, after its audit row (`audit.report`) is sealed.

    Without an authority, the identifier is looked up as one of every source that sent a message, and of none.
    """
    digests, chain = KeyedDigests(keyring), AuditChain(keyring, Sealer(keyring))
    asked = digests.patient(None, patient.type, patient.value).hex()
    with engine.begin() as connection:
        sources = message_sources(connection)
        # The type of a FHIR identifier without one is its system.
        names = (
            [(each, patient.type) for each in {None, *(row["source_id"] for row in sources)}]
            if patient.authority is None
            else [(patient.authority, kind) for kind in {patient.type, patient.authority}]
        )
        events = touched(connection, [digests.patient(of, kind, patient.value) for of, kind in names], asked)
        report = PatientReport(events=events, not_covered=_not_covered(connection, patient, sources, events))
        messages = {each["message_id"] for each in events} - {None}
        write(
            connection,
            chain,
            [
                AuditEvent(
                    action="audit.report",
                    outcome="disclosed",
                    reason=BREAK_GLASS,
                    at=now,
                    actor=actor,
                    note=reason,
                    detail={"patient": asked, "messages": len(messages), "events": len(events)},
                )
            ],
        )
    AuditSealer(engine, keyring).seal_row(*chain.head)
    return report


def _not_covered(
    connection: Connection, patient: PatientIdentifier, sources: list[dict[str, Any]], events: list[dict[str, Any]]
) -> list[str]:
    found = []
    if waiting := sum(each["not_indexed"] for each in sources):
        found.append(f"{waiting} messages are not indexed yet: a worker indexes them; run the report again later")
    if unreadable := sum(each["unreadable"] for each in sources):
        found.append(f"{unreadable} messages are unreadable: their patients are not known")
    oldest = oldest_payload(connection)
    if oldest["message"] is not None and oldest["message"] != oldest["payload"]:
        until = oldest["payload"]
        found.append(
            "payloads are purged"
            + (f" up to {until.isoformat(timespec='seconds')}" if isinstance(until, datetime) else "")
            + ": a message that was purged before it was indexed is not in the report"
        )
    if patient.authority is None:
        found.append(
            "identifiers with an assigning authority of their own (FHIR's identifier.system): give it as the third line"
        )
        if len({each["source_id"] for each in events if each["message_id"] is not None}) > 1:
            found.append(
                "the messages are from several sources, which may use one identifier for different patients: give the "
                "source's id as the third line for one of them"
            )
    found += [
        "other identifiers of the patient: run the report for each",
        "requests to Redox and query answers whose own message does not name the patient",
        "what handlers and other systems did with the data, and what was read in the database without this program",
    ]
    return found
