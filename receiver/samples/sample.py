"""Samples: a valid, plausible body of every kind of message that Redox sends, the same one for the same seed.

For plugin authors' tests, `simulate` and our own tests. Everything in them is synthetic. May not send anything.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from receiver.samples.bundles import bundle
from receiver.samples.kinds import FHIR_CODED_EVENTS, FHIR_EVENTS, WIRE_NAMES
from receiver.samples.people import Person, person
from receiver.samples.scenario import case, render
from receiver.samples.templates import template

__all__ = ["Person", "encode", "kinds", "person", "sample"]


def kinds() -> tuple[str, ...]:
    """Every kind there is a sample of: the 111 Data Model event types, then the FHIR notifications."""
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
    """A body of `kind`, as `kinds()` names it ("PatientAdmin.Arrival", "FHIR.PatientAdminCreated").

    `source_id`: the UUID of the Redox source. `at`: when it happened (aware; by default the seed's own minute).
    `patient`: whom it is about (by default `person(seed)`). `log_id` and `attempt_id` stand in `Meta.Logs`; FHIR
    notifications and sign-ons have none, and FHIR ones no test flag either. Raises KeyError for an unknown kind.
    """
    of = case(kind, seed=seed, patient=patient, at=at)
    model, _, event = kind.partition(".")
    if model == "FHIR":
        return bundle(event, of, source_id=source_id)
    body: dict[str, Any] = render(template(kind), of)
    meta = body["Meta"]
    meta["Source"]["ID"] = source_id
    meta["Test"] = test
    for log in meta.get("Logs", ()):
        log["ID"] = log_id or log["ID"]
        log["AttemptID"] = attempt_id or log["AttemptID"]
    return body


def encode(body: dict[str, Any]) -> bytes:
    """The body as it goes over the wire: compact UTF-8 JSON, Meta first."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
