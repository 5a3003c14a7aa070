"""The Data Model API of the fake Redox API: messages, queries and uploads."""

from __future__ import annotations

import json
import uuid

import httpx2
import pytest

from receiver.simulator.api import FakeRedoxApi
from tests.simulator.api_requests import JWKS, MESSAGE, bearer


def test_a_message(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The response has Meta of the message and new log ids; the message is in `processed`."""
    meta = http.post("/endpoint", json=MESSAGE, headers=bearer(http, api)).json()["Meta"]

    assert {name: meta[name] for name in MESSAGE["Meta"]} == MESSAGE["Meta"]
    assert [str(uuid.UUID(meta["Logs"][0][name])) for name in ("ID", "AttemptID")] == [*meta["Logs"][0].values()]
    assert api.processed == [MESSAGE]


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"DataModel": "PatientAdmin"},
        {"DataModel": "PatientAdmin", "EventType": "Arrival"},
        {"DataModel": "PatientAdmin", "EventType": "Arrival", "Destinations": [{}]},
        {"DataModel": "PatientSearch", "EventType": "Query", "Destinations": [{"ID": "a"}, {"ID": "b"}]},
    ],
    ids=str,
)
def test_a_message_that_cannot_be_routed(api: FakeRedoxApi, http: httpx2.Client, meta: object) -> None:
    """A message without model, event or destination, and a query to two destinations, get Meta.Errors."""
    headers = bearer(http, api)
    for body in (json.dumps({"Meta": meta}), json.dumps([meta]), "{"):
        response = http.post("/endpoint", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["Meta"]["Errors"][0]["Text"]
    assert api.processed == []


def test_two_keys_make_the_source_required(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """With several OAuth keys a message must name its source, in Meta or in the header."""
    api.register_oauth("second", JWKS)
    headers = bearer(http, api)
    named = {"Meta": {**MESSAGE["Meta"], "Source": {"ID": "s"}}}

    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 400
    assert http.post("/endpoint", json=named, headers=headers).status_code == 200
    assert http.post("/endpoint", json=MESSAGE, headers={**headers, "Redox-Source-Id": "s"}).status_code == 200


def test_errors_with_status_200(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """`refuse_next` answers one message 200 with Meta.Errors, and does not accept it."""
    api.refuse_next({"ID": 1, "Text": "no"})
    headers = bearer(http, api)
    refused = http.post("/endpoint", json=MESSAGE, headers=headers)

    assert (refused.status_code, refused.json()["Meta"]["Errors"]) == (200, [{"ID": 1, "Text": "no"}])
    assert api.processed == []
    assert "Errors" not in http.post("/endpoint", json=MESSAGE, headers=headers).json()["Meta"]


@pytest.mark.parametrize("path", ["/endpoint", "/query"])
def test_a_query(api: FakeRedoxApi, http: httpx2.Client, path: str) -> None:
    """A query is answered with its responder's result, and the event type of the response."""
    asked = {"Meta": {"DataModel": "Clinical Summary", "EventType": "PatientQuery", "Destinations": [{"ID": "d"}]}}
    api.respond("ClinicalSummary.PatientQuery", lambda message: {"Heard": message["Meta"]["DataModel"]})
    body = http.post(path, json=asked, headers=bearer(http, api)).json()

    assert (body["Meta"]["EventType"], body["Heard"]) == ("PatientQueryResponse", "Clinical Summary")


def test_uploads(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A file is kept under the URI in the response. Another field, another type, or more than 30 MB is rejected."""
    headers = bearer(http, api)
    uri = http.post("/uploads", files={"file": b"\0\r\n--x"}, headers=headers).json()["URI"]

    assert api.uploads == {uri: b"\0\r\n--x"}
    assert http.post("/uploads", files={"other": b"x"}, headers=headers).status_code == 400
    assert http.post("/uploads", content=b"x", headers=headers).status_code == 400
    cut = {**headers, "Content-Type": "multipart/form-data; boundary=x"}
    assert http.post("/uploads", content=b"--x\r\nContent-Disposition: form-data", headers=cut).status_code == 400
    assert http.post("/uploads", files={"file": bytes(30 * 1024 * 1024 + 1)}, headers=headers).status_code == 413
