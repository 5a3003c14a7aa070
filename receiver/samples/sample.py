"""Sample bodies for every kind of message that Redox sends. The same seed gives the same body.

For tests of plugin authors, `simulate`, and the receiver's own tests. All data is synthetic. Must not send anything.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from receiver.samples.bundles import bundle
from receiver.samples.kinds import FHIR_CODED_EVENTS, FHIR_EVENTS, WIRE_NAMES
from receiver.samples.people import Person, person
from receiver.samples.scenario import make_scenario, render
from receiver.samples.templates import template

__all__ = ["Person", "encode", "kinds", "person", "sample"]


def kinds() -> tuple[str, ...]:
    """Return every kind with a sample: the 111 Data Model event types, then the FHIR notifications."""
    return (*WIRE_NAMES, *(f"FHIR.{event}" for event in (*FHIR_EVENTS, *FHIR_CODED_EVENTS)))


def sample(
    kind: str,
    *,
    seed: int = 0,
    source_id: str,
    test: bool = True,
    patient: Person | None = None,
    at: datetime | None = None,
    log_id: str | None = None,
    attempt_id: str | None = None,
) -> dict[str, Any]:
    """Return a body of `kind`, one of `kinds()` ("PatientAdmin.Arrival", "FHIR.PatientAdminCreated").

    `source_id`: the UUID of the Redox source. `at`: the event's time (aware; default: the minute of the seed).
    `patient`: the patient (default: `person(seed)`). `log_id` and `attempt_id` go into `Meta.Logs`. FHIR notifications
    and sign-ons have no `Meta.Logs`, and FHIR notifications have no test flag. Raises KeyError for an unknown kind.
    """
    scenario = make_scenario(kind, seed=seed, patient=patient, at=at)
    model, _, event = kind.partition(".")
    if model == "FHIR":
        return bundle(event, scenario, source_id=source_id)
    body: dict[str, Any] = render(template(kind), scenario)
    meta = body["Meta"]
    meta["Source"]["ID"] = source_id
    meta["Test"] = test
    for log in meta.get("Logs", ()):
        log["ID"] = log_id or log["ID"]
        log["AttemptID"] = attempt_id or log["AttemptID"]
    return body


def encode(body: dict[str, Any]) -> bytes:
    """Encode the body as it is sent: compact UTF-8 JSON, Meta first."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
