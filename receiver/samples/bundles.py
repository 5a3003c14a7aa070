"""FHIR notifications: message Bundles in the two forms that Redox has documented.

The current form names the event by `eventUri` and its source as `urn:uuid:…`. The form used until 2024 has
`eventCoding` and a bare UUID. Not a FHIR validator: the resources contain only the fields that handlers commonly read.
"""

from __future__ import annotations

from typing import Any, Final

from receiver.samples.codes import Code, choose, measured
from receiver.samples.field_values import FACILITY
from receiver.samples.kinds import FHIR_CODED_EVENTS, FHIR_EVENTS
from receiver.samples.scenario import Scenario

_EVENTS: Final = "https://fhir.redoxengine.com/EventDefinition"
_DEFINITIONS: Final = "https://fhir.redoxengine.com/MessageDefinition"
_TERMINOLOGY: Final = "http://terminology.hl7.org/CodeSystem"


def bundle(event: str, of: Scenario, *, source_id: str) -> dict[str, Any]:
    """Return the notification of `event`, a name in `kinds.FHIR_EVENTS` or `FHIR_CODED_EVENTS`. Raises KeyError
    otherwise.
    """
    coded = event in FHIR_CODED_EVENTS
    about = (FHIR_CODED_EVENTS if coded else FHIR_EVENTS)[event]
    patient, focus = of.uuid("patient"), of.uuid("focus")
    header: dict[str, Any] = {
        "resourceType": "MessageHeader",
        "id": of.uuid("header"),
        "source": {"name": f"{FACILITY} EHR", "endpoint": source_id if coded else f"urn:uuid:{source_id}"},
        "focus": [{"reference": f"urn:uuid:{patient if about is None else focus}"}],
    }
    if coded:
        header["eventCoding"] = {"system": "urn:redox:event-type", "code": event}
    else:
        header["eventUri"] = f"{_EVENTS}/{event}"
        header["definition"] = f"{_DEFINITIONS}/{event}Full"
    resources = [header, _patient(of, patient)]
    if about is not None:
        resources.append({"resourceType": about, "id": focus, **_focus(about, of, f"urn:uuid:{patient}")})
    return {
        "resourceType": "Bundle",
        "id": of.uuid("bundle"),
        "type": "message",
        "entry": [{"fullUrl": f"urn:uuid:{resource['id']}", "resource": resource} for resource in resources],
    }


def _patient(of: Scenario, identity: str) -> dict[str, Any]:
    who = of.patient
    return {
        "resourceType": "Patient",
        "id": identity,
        "identifier": [
            {"system": "urn:redox:MR", "value": who.mrn},
            {"system": "urn:redox:EHRID", "value": who.ehr_id},
        ],
        "name": [{"use": "official", "family": who.family, "given": [who.given, who.middle]}],
        "gender": who.sex.lower(),
        "birthDate": who.born.isoformat(),
        "telecom": [
            {"system": "phone", "use": "home", "value": who.home_phone},
            {"system": "email", "value": who.email},
        ],
        "address": [
            {
                "use": "home",
                "line": [who.street],
                "city": who.city,
                "district": who.county,
                "state": who.state,
                "postalCode": who.zip,
                "country": "US",
            }
        ],
    }


def _focus(resource: str, of: Scenario, patient: str) -> dict[str, Any]:
    """Return the fields of a resource of that type, in addition to its id."""
    subject = {"subject": {"reference": patient}}
    match resource:
        case "Encounter":
            return {
                "identifier": [{"value": str(of.number("visit"))}],
                "status": "in-progress",
                "class": {"system": f"{_TERMINOLOGY}/v3-ActCode", "code": "IMP"},
                **subject,
                "period": {"start": of.time(2)},
            }
        case "Appointment":
            return {
                "identifier": [{"value": str(of.number("visit"))}],
                "status": "booked",
                "start": of.time(48),
                "end": of.time(48.5),
                "participant": [{"actor": {"reference": patient}, "status": "accepted"}],
            }
        case "Observation":
            value, unit, low, high = measured(of, "observation")
            return {
                "status": "final",
                "code": _code(choose(of, "observation")),
                **subject,
                "effectiveDateTime": of.time(-1),
                "valueQuantity": {"value": value, "unit": unit},
                "referenceRange": [{"low": {"value": low, "unit": unit}, "high": {"value": high, "unit": unit}}],
            }
        case "DocumentReference":
            return {
                "status": "current",
                "type": _code(choose(of, "document")),
                **subject,
                "date": of.time(-1),
                "content": [{"attachment": {"contentType": "text/plain", "data": "UGF0aWVudCBpcyB3ZWxsLg=="}}],
            }
        case "ChargeItem":
            return {
                "status": "billable",
                "code": _code(choose(of, "procedure")),
                **subject,
                "occurrenceDateTime": of.time(-24),
                "priceOverride": {"value": 230.0, "currency": "USD"},
            }
        case "MedicationRequest":
            return {
                "status": "active",
                "intent": "order",
                "medicationCodeableConcept": _code(choose(of, "medication")),
                **subject,
                "authoredOn": of.time(),
            }
        case "DeviceRequest":
            return {
                "status": "active",
                "intent": "order",
                "codeCodeableConcept": _code(choose(of, "device")),
                **subject,
                "authoredOn": of.time(),
            }
        case _:  # ServiceRequest
            return {
                "status": "active",
                "intent": "order",
                "identifier": [{"value": str(of.number("order"))}],
                "code": _code(choose(of, "procedure")),
                **subject,
                "authoredOn": of.time(),
            }


def _code(concept: Code) -> dict[str, Any]:
    return {
        "coding": [{"system": f"urn:oid:{concept.system}", "code": concept.code, "display": concept.name}],
        "text": concept.name,
    }
