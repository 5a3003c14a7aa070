"""FHIR notifications: message Bundles."""

from __future__ import annotations

from typing import Any

from receiver.samples.kinds import FHIR_CODED_EVENTS, FHIR_EVENTS
from receiver.samples.people import person
from receiver.samples.sample import sample
from tests.simulator import SOURCE

Bodies = dict[str, dict[str, Any]]


def header(body: dict[str, Any]) -> dict[str, Any]:
    resource: dict[str, Any] = body["entry"][0]["resource"]
    return resource


def test_todays_form(bodies: Bodies) -> None:
    """A message Bundle has a MessageHeader with the event by URI and the source by URN."""
    for event in FHIR_EVENTS:
        body = bodies[f"FHIR.{event}"]
        assert (body["resourceType"], body["type"]) == ("Bundle", "message")
        first = header(body)
        assert first["resourceType"] == "MessageHeader"
        assert first["eventUri"] == f"https://fhir.redoxengine.com/EventDefinition/{event}"
        assert first["source"]["endpoint"] == f"urn:uuid:{SOURCE}"
        assert "eventCoding" not in first


def test_the_form_until_2024(bodies: Bodies) -> None:
    """The event is a coding, and the source is a bare UUID."""
    for event in FHIR_CODED_EVENTS:
        first = header(bodies[f"FHIR.{event}"])
        assert first["eventCoding"] == {"system": "urn:redox:event-type", "code": event}
        assert first["source"]["endpoint"] == SOURCE
        assert "eventUri" not in first


def test_every_reference_leads_to_an_entry(bodies: Bodies) -> None:
    """The focus and the patient are in the Bundle."""
    for event, resource in (FHIR_EVENTS | FHIR_CODED_EVENTS).items():
        body = bodies[f"FHIR.{event}"]
        entries = {entry["fullUrl"]: entry["resource"] for entry in body["entry"]}
        assert all(url == f"urn:uuid:{entry['id']}" for url, entry in entries.items())
        focus = entries[header(body)["focus"][0]["reference"]]
        assert focus["resourceType"] == (resource or "Patient")
        subject = focus.get("subject") or focus.get("participant", [{}])[0].get("actor")
        if resource is not None:
            assert entries[subject["reference"]]["resourceType"] == "Patient"


def test_the_patient_is_the_one_passed_in() -> None:
    """A given patient is in the Patient resource."""
    who = person(3, family="Zzcanary")
    patient = sample("FHIR.PatientAdminCreated", source_id=SOURCE, patient=who)["entry"][1]["resource"]
    assert patient["name"][0]["family"] == "Zzcanary"
    assert patient["identifier"][0]["value"] == who.mrn
