"""FHIR through Redox, against the fake API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from receiver.outbound import Answer, FhirDestination, Rejected, Unsendable
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import Received
from tests.outbound.conftest import LEGACY, Connect

PATIENT = {"resourceType": "Patient", "id": "p-1"}
BUNDLE = {
    "resourceType": "Bundle",
    "type": "message",
    "entry": [{"resource": {"resourceType": "MessageHeader"}}, {"resource": PATIENT}],
}


@pytest.fixture
def fhir(connect: Connect) -> FhirDestination[Answer]:
    return connect(source="source-1").fhir("our-ehr", "Development")


def last(api: FakeRedoxApi) -> Received:
    return api.received("/fhir/")[-1]


def test_read(api: FakeRedoxApi, fhir: FhirDestination[Answer]) -> None:
    """A read is a GET below the destination's slug and environment, with the source in the header."""
    api.resources["Patient", "p-1"] = PATIENT

    assert fhir.read("Patient", "p-1").data == PATIENT
    assert (last(api).method, last(api).path) == ("GET", "/fhir/R4/our-ehr/Development/Patient/p-1")
    assert last(api).headers["redox-source-id"] == "source-1"
    assert last(api).headers["accept"] == "application/fhir+json"


def test_an_unknown_resource(fhir: FhirDestination[Answer]) -> None:
    """An unknown resource is an error with the code of the OperationOutcome."""
    with pytest.raises(Rejected) as caught:
        fhir.read("Patient", "p-2")

    assert (caught.value.status, caught.value.details[0].type) == (404, "not-found")


def test_search_is_a_form(api: FakeRedoxApi, fhir: FhirDestination[Answer]) -> None:
    """Search parameters are in the body, never in the URL."""
    api.resources["Patient", "p-1"] = PATIENT
    answer = fhir.search("Patient", {"family": "Grö&ße", "given": ["A", "B"]})

    assert answer.data["entry"] == [{"resource": PATIENT}]
    assert last(api).path == "/fhir/R4/our-ehr/Development/Patient/_search"
    assert last(api).body == b"family=Gr%C3%B6%26%C3%9Fe&given=A&given=B"


@pytest.mark.parametrize("body", [BUNDLE, json.dumps(BUNDLE).encode()], ids=["dict", "bytes"])
def test_an_operation_posts_a_resource(api: FakeRedoxApi, fhir: FhirDestination[Answer], body: Any) -> None:
    """An operation sends a resource as application/fhir+json."""
    assert fhir.operation("Patient", "$patient-update", body).data["type"] == "message"
    assert last(api).path == "/fhir/R4/our-ehr/Development/Patient/$patient-update"
    assert last(api).headers["content-type"] == "application/fhir+json"
    assert last(api).json() == BUNDLE


def test_a_message_bundle_is_posted(api: FakeRedoxApi, fhir: FhirDestination[Answer]) -> None:
    """A message Bundle is sent with its operation."""
    assert fhir.message("Patient", "$patient-update", BUNDLE).status == 200
    assert last(api).json() == BUNDLE


@pytest.mark.parametrize(
    "bundle",
    [
        {},
        PATIENT,
        {**BUNDLE, "type": "transaction"},
        {**BUNDLE, "entry": []},
        {**BUNDLE, "entry": None},
        {**BUNDLE, "entry": [{"resource": PATIENT}]},
        {**BUNDLE, "entry": [7]},
    ],
    ids=str,
)
def test_an_invalid_message_bundle(api: FakeRedoxApi, fhir: FhirDestination[Answer], bundle: dict[str, Any]) -> None:
    """A Bundle of another type, or without a MessageHeader first, is refused before it is sent."""
    with pytest.raises(Unsendable, match="MessageHeader"):
        fhir.message("Patient", "$patient-update", bundle)
    assert api.requests == []


@pytest.mark.parametrize("bad", ["", "patient", "Patient/..", "Patient?x=", "../Patient", "Pätient", "$x"])
def test_parts_of_a_path_are_checked(api: FakeRedoxApi, fhir: FhirDestination[Answer], bad: str) -> None:
    """Resource types, ids and operations are checked against their grammar, so they cannot change the path."""
    with pytest.raises(Unsendable, match="not valid: use a"):
        fhir.read(bad, "p-1")
    with pytest.raises(Unsendable, match="not valid: use an operation"):
        fhir.operation("Patient", f"{bad}/x", BUNDLE)
    assert api.requests == []


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a b", "a?b", "%2e", "a" * 65])
def test_an_invalid_id(api: FakeRedoxApi, fhir: FhirDestination[Answer], bad: str) -> None:
    """An invalid id, or one that would change the path, is refused."""
    with pytest.raises(Unsendable, match="FHIR id"):
        fhir.read("Patient", bad)
    assert api.requests == []


def test_a_destination_is_checked(connect: Connect) -> None:
    """A slug or environment that Redox does not have is refused."""
    client: Any = connect()
    with pytest.raises(Unsendable, match="slug"):
        client.fhir("our/ehr", "Development")
    with pytest.raises(Unsendable, match="Development, Staging, Production"):
        client.fhir("our-ehr", "development")


def test_a_body_without_a_type_is_not_sent(fhir: FhirDestination[Answer]) -> None:
    """A body without a resource type is refused."""
    with pytest.raises(Unsendable, match="resourceType"):
        fhir.operation("Patient", "$patient-update", {"id": "p-1"})


def test_a_legacy_key(connect: Connect) -> None:
    """A legacy key is only for the Data Model API, so FHIR with it is refused before it is sent."""
    with pytest.raises(Unsendable, match="legacy"):
        connect(LEGACY).fhir("our-ehr", "Development")


def test_several_keys_require_a_source(connect: Connect) -> None:
    """Where several API keys exist, a FHIR request without a source is refused."""
    with pytest.raises(Unsendable, match="the request has no source"):
        connect(several_keys=True).fhir("our-ehr", "Development").read("Patient", "p-1")
