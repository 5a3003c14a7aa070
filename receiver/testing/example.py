"""An example of a plugin: a handler that notes who came and went, and a responder that knows one made-up patient.

`./deploy/quickstart` runs it (RECEIVER_HANDLERS=receiver.testing.example). May not be taken for more than a beginning:
a plugin of yours is a package of yours, and imports receiver.handlers alone.
"""

from __future__ import annotations

from typing import Any

from receiver.handlers import Context, GiveUp, Message, handler, responder


@handler("PatientAdmin.*", "FHIR.*", name="example-census", ordering="patient", patient_key="MR")
def census(message: Message, context: Context) -> None:
    """Note an event of a patient's stay. Of one patient, the events come here in the order in which they happened."""
    visit = message.data.get("Visit") or {}
    if not isinstance(visit, dict):
        raise GiveUp("visit_malformed")
    # Ids and fixed words alone: nothing of a patient's may be logged.
    context.log.info("census.noted", kind=message.kind, message_id=message.log_id)


@responder("PatientSearch.Query", name="example-search", timeout=10)
def search(message: Message, context: Context) -> dict[str, Any]:  # noqa: ARG001 - the signature is the contract's
    """Answer that there is one such patient, with the demographics that were asked for."""
    asked = (message.data.get("Patient") or {}).get("Demographics") or {}
    return {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response"},
        "Patient": {"Identifiers": [{"ID": "EX-0001", "IDType": "MR"}], "Demographics": asked},
    }
