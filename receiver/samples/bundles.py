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


def bundle(event: str, scenario: Scenario, *, source_id: str) -> dict[str, Any]:
    """Return the notification of `event`, a name in `kinds.FHIR_EVENTS` or `FHIR_CODED_EVENTS`. Raises KeyError
    otherwise.
    """
    coded = event in FHIR_CODED_EVENTS
    about = (FHIR_CODED_EVENTS if coded else FHIR_EVENTS)[event]
    patient, focus = scenario.uuid("patient"), scenario.uuid("focus")
    header: dict[str, Any] = {
        "resourceType": "MessageHeader",
        "id": scenario.uuid("header"),
        "source": {"name": f"{FACILITY} EHR", "endpoint": source_id if coded else f"urn:uuid:{source_id}"},
        "focus": [{"reference": f"urn:uuid:{patient if about is None else focus}"}],
    }
    if coded:
        header["eventCoding"] = {"system": "urn:redox:event-type", "code": event}
    else:
        header["eventUri"] = f"{_EVENTS}/{event}"
        header["definition"] = f"{_DEFINITIONS}/{event}Full"
    resources = [header, _patient(scenario, patient)]
    if about is not None:
        resources.append({"resourceType": about, "id": focus, **_focus(about, scenario, f"urn:uuid:{patient}")})
    return {
        "resourceType": "Bundle",
        "id": scenario.uuid("bundle"),
        "type": "message",
        "entry": [{"fullUrl": f"urn:uuid:{resource['id']}", "resource": resource} for resource in resources],
    }


def _patient(scenario: Scenario, identity: str) -> dict[str, Any]:
    person = scenario.patient
    return {
        "resourceType": "Patient",
        "id": identity,
        "identifier": [
            {"system": "urn:redox:MR", "value": person.mrn},
            {"system": "urn:redox:EHRID", "value": person.ehr_id},
        ],
        "name": [{"use": "official", "family": person.family, "given": [person.given, person.middle]}],
        "gender": person.sex.lower(),
        "birthDate": person.born.isoformat(),
        "telecom": [
            {"system": "phone", "use": "home", "value": person.home_phone},
            {"system": "email", "value": person.email},
        ],
        "address": [
            {
                "use": "home",
                "line": [person.street],
                "city": person.city,
                "district": person.county,
                "state": person.state,
                "postalCode": person.zip,
                "country": "US",
            }
        ],
    }


def _focus(resource: str, scenario: Scenario, patient: str) -> dict[str, Any]:
    """Return the fields of a resource of that type, in addition to its id."""
    subject = {"subject": {"reference": patient}}
    match resource:
        case "Encounter":
            return {
                "identifier": [{"value": str(scenario.number("visit"))}],
                "status": "in-progress",
                "class": {"system": f"{_TERMINOLOGY}/v3-ActCode", "code": "IMP"},
                **subject,
                "period": {"start": scenario.time(2)},
            }
        case "Appointment":
            return {
                "identifier": [{"value": str(scenario.number("visit"))}],
                "status": "booked",
                "start": scenario.time(48),
                "end": scenario.time(48.5),
                "participant": [{"actor": {"reference": patient}, "status": "accepted"}],
            }
        case "Observation":
            value, unit, low, high = measured(scenario, "observation")
            return {
                "status": "final",
                "code": _code(choose(scenario, "observation")),
                **subject,
                "effectiveDateTime": scenario.time(-1),
                "valueQuantity": {"value": value, "unit": unit},
                "referenceRange": [{"low": {"value": low, "unit": unit}, "high": {"value": high, "unit": unit}}],
            }
        case "DocumentReference":
            return {
                "status": "current",
                "type": _code(choose(scenario, "document")),
                **subject,
                "date": scenario.time(-1),
                "content": [{"attachment": {"contentType": "text/plain", "data": "UGF0aWVudCBpcyB3ZWxsLg=="}}],
            }
        case "ChargeItem":
            return {
                "status": "billable",
                "code": _code(choose(scenario, "procedure")),
                **subject,
                "occurrenceDateTime": scenario.time(-24),
                "priceOverride": {"value": 230.0, "currency": "USD"},
            }
        case "MedicationRequest":
            return {
                "status": "active",
                "intent": "order",
                "medicationCodeableConcept": _code(choose(scenario, "medication")),
                **subject,
                "authoredOn": scenario.time(),
            }
        case "DeviceRequest":
            return {
                "status": "active",
                "intent": "order",
                "codeCodeableConcept": _code(choose(scenario, "device")),
                **subject,
                "authoredOn": scenario.time(),
            }
        case _:  # ServiceRequest
            return {
                "status": "active",
                "intent": "order",
                "identifier": [{"value": str(scenario.number("order"))}],
                "code": _code(choose(scenario, "procedure")),
                **subject,
                "authoredOn": scenario.time(),
            }


def _code(concept: Code) -> dict[str, Any]:
    return {
        "coding": [{"system": f"urn:oid:{concept.system}", "code": concept.code, "display": concept.name}],
        "text": concept.name,
    }
