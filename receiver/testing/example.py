"""An example plugin: two handlers and a responder.

One handler notes admissions and discharges, and one answers orders with results. The responder knows one fictional
patient. `./deploy/quickstart` runs it (RECEIVER_HANDLERS=receiver.testing.example). Use it as a starting point only:
make your plugin a separate package that imports only receiver.handlers.
"""

from __future__ import annotations

from typing import Any

from receiver.handlers import Context, GiveUp, Message, handler, responder

# The destination at Redox for the results, by the id that its dashboard shows.
RESULTS_TO = "2b1f6f2c-0000-4000-8000-000000000002"


@handler("PatientAdmin.*", "FHIR.*", name="example-census", ordering="patient", patient_key="MR")
def census(message: Message, context: Context) -> None:
    """Note an event of a patient's stay. The events of one patient arrive in the order in which they happened."""
    visit = message.data.get("Visit") or {}
    if not isinstance(visit, dict):
        raise GiveUp("visit_malformed")
    # Log only ids and fixed words, never patient data.
    context.log.info("census.noted", kind=message.kind, message_id=message.log_id)


@handler("Order.New", name="example-result")
def result(message: Message, context: Context) -> None:
    """Answer an order with results, as a message to Redox.

    It is sent after this run has succeeded, in order, and tried until Redox accepts it. The destination needs a reply
    key (`destination set NAME --reply-with KEY`).
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
def search(message: Message, context: Context) -> dict[str, Any]:  # noqa: ARG001 - the plugin API requires it
    """Answer that one patient matches, with the requested demographics."""
    asked = (message.data.get("Patient") or {}).get("Demographics") or {}
    return {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response"},
        "Patient": {"Identifiers": [{"ID": "EX-0001", "IDType": "MR"}], "Demographics": asked},
    }
