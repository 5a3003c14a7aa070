"""An example of a plugin: a handler that notes who came and went, one that answers orders by results, and a responder
that knows one made-up patient.

`./deploy/quickstart` runs it (RECEIVER_HANDLERS=receiver.testing.example). May not be taken for more than a beginning:
a plugin of yours is a package of yours, and imports receiver.handlers alone.
"""

from __future__ import annotations

from typing import Any

from receiver.handlers import Context, GiveUp, Message, handler, responder

# Where the results go: a destination at Redox, by the id that its dashboard shows.
RESULTS_TO = "2b1f6f2c-0000-4000-8000-000000000002"


@handler("PatientAdmin.*", "FHIR.*", name="example-census", ordering="patient", patient_key="MR")
def census(message: Message, context: Context) -> None:
    """Note an event of a patient's stay. Of one patient, the events come here in the order in which they happened."""
    visit = message.data.get("Visit") or {}
    if not isinstance(visit, dict):
        raise GiveUp("visit_malformed")
    # Ids and fixed words alone: nothing of a patient's may be logged.
    context.log.info("census.noted", kind=message.kind, message_id=message.log_id)


@handler("Order.New", name="example-result")
def result(message: Message, context: Context) -> None:
    """Answer an order by its results, a message to Redox: it goes out once this run has succeeded, in order, and is
    tried until Redox has it. The destination needs a key to speak with (`destination set NAME --reply-with KEY`).
    """
    order = message.data.get("Order") or {}
    context.outbox.send(
        {
            "Meta": {
                "DataModel": "Results",
                "EventType": "New",
                "Test": message.test,
                "Destinations": [{"ID": RESULTS_TO}],
            },
            "Patient": message.data.get("Patient"),
            "Orders": [{"ID": order.get("ID"), "Status": "Final", "Results": []}],
        }
    )


@responder("PatientSearch.Query", name="example-search", timeout=10)
def search(message: Message, context: Context) -> dict[str, Any]:  # noqa: ARG001 - the signature is the contract's
    """Answer that there is one such patient, with the demographics that were asked for."""
    asked = (message.data.get("Patient") or {}).get("Demographics") or {}
    return {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response"},
        "Patient": {"Identifiers": [{"ID": "EX-0001", "IDType": "MR"}], "Demographics": asked},
    }
