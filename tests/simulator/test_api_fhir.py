"""The FHIR API of the fake Redox API."""

from __future__ import annotations

import json

import httpx2

from receiver.simulator.api import FakeRedoxApi
from tests.simulator.api_requests import bearer


def test_fhir(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Read, search by POST and operations are answered in FHIR; anything else with an OperationOutcome."""
    patient = {"resourceType": "Patient", "id": "p"}
    api.resources["Patient", "p"] = patient
    headers = bearer(http, api)
    base = "/fhir/R4/slug/Staging"

    assert http.get(f"{base}/Patient/p", headers=headers).json() == patient
    found = http.post(f"{base}/Patient/_search", data={"family": "x"}, headers=headers).json()
    assert (found["type"], found["entry"]) == ("searchset", [{"resource": patient}])
    fhir = {**headers, "Content-Type": "application/fhir+json"}
    bundle = json.dumps({"resourceType": "Bundle", "type": "message"})
    assert http.post(f"{base}/Patient/$patient-update", content=bundle, headers=fhir).json()["type"] == "message"
    for response in (
        http.get(f"{base}/Patient/q", headers=headers),
        http.get("/fhir/R4/slug/Moon/Patient/p", headers=headers),
        http.post(f"{base}/Patient/_search", json={}, headers=headers),
        http.post(f"{base}/Patient/$patient-update", json={}, headers=headers),
        http.post(f"{base}/Patient/$patient-update", content="{}", headers=fhir),
        http.post(f"{base}/Patient/update", content=bundle, headers=fhir),
    ):
        assert response.status_code >= 400
        assert response.json()["resourceType"] == "OperationOutcome"
        assert response.headers["content-type"] == "application/fhir+json"
