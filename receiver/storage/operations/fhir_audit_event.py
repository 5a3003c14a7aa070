"""FHIR R4 AuditEvents made of audit rows. Codes follow IHE Basic Audit Log Patterns (BALP) where one fits.

Must not pass on `detail`, a sealed reason, a query or a patient's identifier: a message is named by its UUID.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid5

from receiver.storage.evidence.audit_log import BREAK_GLASS

_DICOM: Final = "http://dicom.nema.org/resources/ontology/DCM"
_TERMINOLOGY: Final = "http://terminology.hl7.org/CodeSystem"
_URI: Final = "urn:ietf:rfc:3986"
# The code system of this program's own actions (the column `action`).
_ACTIONS: Final = "urn:uuid:5f0d2a0e-6c1b-4b52-9a6e-2f5a3e0c7d41"

Coding = dict[str, str]


def _coding(system: str, code: str, display: str) -> Coding:
    return {"system": system, "code": code, "display": display}


def _terminology(system: str, code: str, display: str) -> Coding:
    return _coding(f"{_TERMINOLOGY}/{system}", code, display)


class _Codes(NamedTuple):
    """An event's type, its subtypes, and FHIR's action: C create, R read, U update, E execute."""

    type: Coding
    subtypes: tuple[Coding, ...]
    action: str


_APPLICATION: Final = _coding(_DICOM, "110100", "Application Activity")
_AUDIT_LOG: Final = _coding(_DICOM, "110101", "Audit Log Used")
_EXPORT: Final = _coding(_DICOM, "110106", "Export")
_IMPORT: Final = _coding(_DICOM, "110107", "Import")
_QUERY: Final = _coding(_DICOM, "110112", "Query")
_ALERT: Final = _coding(_DICOM, "110113", "Security Alert")
_AUTHENTICATION: Final = _coding(_DICOM, "110114", "User Authentication")
_LOGIN: Final = _coding(_DICOM, "110122", "Login")
_NODE: Final = _coding(_DICOM, "110126", "Node Authentication")
_CONFIGURATION: Final = _coding(_DICOM, "110129", "Security Configuration")
_DISCLOSE: Final = _terminology("iso-21089-lifecycle", "disclose", "Disclose")
_RECEIVE: Final = _terminology("iso-21089-lifecycle", "receive", "Receive")
_TRANSMIT: Final = _terminology("iso-21089-lifecycle", "transmit", "Transmit")

_BY_ACTION: Final = {
    "message.receive": _Codes(_IMPORT, (_RECEIVE,), "C"),
    "message.refuse": _Codes(_ALERT, (_NODE,), "E"),
    "token.refuse": _Codes(_ALERT, (_NODE,), "E"),
    "token.issue": _Codes(_AUTHENTICATION, (_LOGIN,), "E"),
    "destination.handshake": _Codes(_AUTHENTICATION, (_NODE,), "E"),
    "query.answer": _Codes(_QUERY, (_DISCLOSE,), "E"),
    "outbound.query": _Codes(_QUERY, (_TRANSMIT,), "E"),
    "outbound.send": _Codes(_EXPORT, (_TRANSMIT,), "R"),
    "outbound.fhir": _Codes(_EXPORT, (_TRANSMIT,), "R"),
    "outbound.upload": _Codes(_EXPORT, (_TRANSMIT,), "R"),
    "message.disclose": _Codes(_EXPORT, (_DISCLOSE,), "R"),
    "delivery.disclose": _Codes(_EXPORT, (_DISCLOSE,), "R"),
    "outbound.disclose": _Codes(_EXPORT, (_DISCLOSE,), "R"),
}
_REGISTRY: Final = frozenset(
    {"api_key", "credential", "destination", "handler", "key", "key_set", "signing_key", "source"}
)
_CREATES: Final = frozenset({"add", "new"})

_MINOR: Final = frozenset({"refused", "failed", "dead", "wrong"})
_SERIOUS: Final = frozenset({"unavailable"})

_BREAK_GLASS: Final = {"coding": [_terminology("v3-ActReason", "BTG", "break the glass")]}
_SOURCE: Final = {"coding": [_coding(_DICOM, "110153", "Source Role ID")]}
_DESTINATION: Final = {"coding": [_coding(_DICOM, "110152", "Destination Role ID")]}
_PERSON: Final = {"coding": [_terminology("extra-security-role-type", "humanuser", "human user")]}
_PROCESS: Final = {"coding": [_terminology("extra-security-role-type", "dataprocessor", "data processor")]}
_SERVER: Final = _terminology("security-source-type", "4", "Application Server")
_SYSTEM_OBJECT: Final = _terminology("audit-entity-type", "2", "System Object")
_RESOURCE_ROLE: Final = _terminology("object-role", "4", "Domain Resource")
_SECURITY_ROLE: Final = _terminology("object-role", "13", "Security Resource")


def fhir_audit_event(row: Mapping[str, Any], log: UUID) -> dict[str, Any]:
    """Return the AuditEvent of a row that `queries.export_queries.export_rows` gave. `log`: the log's identity.

    The same row always gets the same id.
    """
    codes = _codes(row["action"])
    event: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": str(uuid5(row["writer"], str(row["n"]))),
        "meta": {"source": f"urn:uuid:{log}#{row['log_index']}"},
        "type": codes.type,
        "subtype": [*codes.subtypes, {"system": _ACTIONS, "code": row["action"]}],
        "action": codes.action,
        "recorded": row["at"].isoformat(),
        "outcome": _outcome(row["outcome"]),
        "outcomeDesc": _described(row),
        "agent": _agents(row),
        "source": {
            "site": f"urn:uuid:{log}",
            "observer": {"identifier": _urn(row["writer"]), "display": "redox-receiver"},
            "type": [_SERVER],
        },
    }
    if row["reason"] == BREAK_GLASS:
        event["purposeOfEvent"] = [_BREAK_GLASS]
    if entities := _entities(row):
        event["entity"] = entities
    return event


def _codes(action: str) -> _Codes:
    subject, _, verb = action.partition(".")
    if action in _BY_ACTION:
        return _BY_ACTION[action]
    if subject == "audit":
        return _Codes(_AUDIT_LOG, (), "R")
    if subject in _REGISTRY:
        return _Codes(_ALERT, (_CONFIGURATION,), "C" if verb in _CREATES else "U")
    return _Codes(_APPLICATION, (), "E")


def _outcome(outcome: str) -> str:
    """Return FHIR's code: 0 success, 4 minor failure, 8 serious failure."""
    return "8" if outcome in _SERIOUS else "4" if outcome in _MINOR else "0"


def _described(row: Mapping[str, Any]) -> str:
    reason = "" if row["reason"] is None else f" ({row['reason']})"
    return f"{row['outcome']}{reason}" + (f", {row['count']} events" if row["count"] > 1 else "")


def _agents(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return who acted, and the destination where one is named."""
    actor = row["actor"]
    kind = _PERSON if "@" in actor else _SOURCE if actor in ("redox", "unverified") else _PROCESS
    first: dict[str, Any] = {
        "type": kind,
        "who": {"identifier": {"value": actor.split(" ")[0]}, "display": actor},
        "requestor": True,
    }
    if row["peer"] is not None and _is_address(row["peer"]):
        first["network"] = {"address": row["peer"], "type": "2"}
    if row["destination"] is None:
        return [first]
    return [first, {"type": _DESTINATION, "who": {"identifier": {"value": row["destination"]}}, "requestor": False}]


def _entities(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if row["message_uuid"] is not None:
        found.append(
            {"what": {"identifier": _urn(row["message_uuid"])}, "type": _SYSTEM_OBJECT, "role": _RESOURCE_ROLE}
        )
    if row["subject"] is not None:
        found.append({"what": {"identifier": {"value": row["subject"]}}, "type": _SYSTEM_OBJECT})
    if row["action"].startswith("audit."):
        found.append({"what": {"display": "audit log"}, "type": _SYSTEM_OBJECT, "role": _SECURITY_ROLE})
    return found


def _urn(uuid: UUID) -> dict[str, str]:
    return {"system": _URI, "value": f"urn:uuid:{uuid}"}


def _is_address(peer: str) -> bool:
    try:
        ip_address(peer)
    except ValueError:
        return False
    return True
