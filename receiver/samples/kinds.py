"""The event types that Redox can send: 24 Data Models with 111 event types, and 32 FHIR notifications.

Must not decide anything: the receiver accepts every kind, known or unknown. This list is only for samples.
"""

from __future__ import annotations

from typing import Final

# As sent by Redox, in the order of Redox's reference.
DATA_MODELS: Final[dict[str, tuple[str, ...]]] = {
    "Claim": ("Payment", "PaymentBatch", "Submission", "SubmissionBatch"),
    "Clinical Decisions": ("Request", "Response"),
    "Clinical Summary": (
        "DocumentGet",
        "DocumentGetResponse",
        "DocumentQuery",
        "DocumentQueryResponse",
        "PatientPush",
        "PatientQuery",
        "PatientQueryResponse",
        "VisitPush",
        "VisitQuery",
        "VisitQueryResponse",
    ),
    "Device": ("New",),
    "Enrichment": (
        "NaturalLanguageProcessingQuery",
        "NaturalLanguageProcessingQueryResponse",
        "NormalizationQuery",
        "NormalizationQueryResponse",
    ),
    "Financial": ("AccountUpdate", "Transaction"),
    "Flowsheet": ("New",),
    "Inventory": ("Deplete", "Update"),
    "Media": ("New", "Replace", "Delete", "Query", "QueryResponse"),
    "Medications": ("Administration", "New", "Update", "Cancel"),
    "Notes": ("New", "Replace", "Delete", "Query", "QueryResponse"),
    "Order": ("New", "Update", "Cancel", "GroupedOrders", "Query", "QueryResponse"),
    "Organization": ("New", "Update", "Query", "QueryResponse"),
    "PatientAdmin": (
        "Arrival",
        "Cancel",
        "CensusQuery",
        "CensusQueryResponse",
        "Discharge",
        "NewPatient",
        "PatientMerge",
        "PatientUpdate",
        "PreAdmit",
        "Registration",
        "Transfer",
        "VisitMerge",
        "VisitQuery",
        "VisitQueryResponse",
        "VisitUpdate",
    ),
    "PatientEducation": ("New", "Update", "Delete"),
    "PatientSearch": ("Query", "Response", "LocationQuery", "LocationQueryResponse"),
    "Provider": ("Activate", "Deactivate", "New", "Update", "ProviderQuery", "ProviderQueryResponse"),
    "Referral": ("New", "Modify", "Cancel", "AuthReview", "AuthResponse", "Query", "QueryResponse"),
    "Research": ("Study", "SubjectUpdate"),
    "Results": ("New", "NewUnsolicited", "Query", "QueryResponse"),
    "Scheduling": (
        "AvailableSlots",
        "AvailableSlotsResponse",
        "Booked",
        "BookedResponse",
        "Cancel",
        "Modification",
        "New",
        "NoShow",
        "PushSlots",
        "Reschedule",
    ),
    "SSO": ("Sign-on",),
    "SurgicalScheduling": ("Cancel", "Modification", "New", "NoShow", "Reschedule"),
    "Vaccination": ("Administration", "New", "PatientQuery", "PatientQueryResponse"),
}

# Every (DataModel, EventType) as sent by Redox.
KINDS: Final[tuple[tuple[str, str], ...]] = tuple(
    (model, event) for model, events in DATA_MODELS.items() for event in events
)

# Handler pattern (without spaces) → names as sent by Redox: "ClinicalSummary.PatientPush" → its two names.
WIRE_NAMES: Final[dict[str, tuple[str, str]]] = {
    f"{model}.{event}".replace(" ", ""): (model, event) for model, event in KINDS
}

# FHIR notifications, and the resource that each contains in addition to the patient (None: only the patient). Redox
# publishes bodies for some of them. The names of the others follow the same pattern. They have changed before: do not
# rely on them.
FHIR_EVENTS: Final[dict[str, str | None]] = {
    **{f"DocumentReference{end}": "DocumentReference" for end in ("Created", "Deleted", "Replaced")},
    "FinancialNew": "ChargeItem",
    **{
        f"{resource}{end}": resource
        for resource in ("DeviceRequest", "MedicationRequest", "ServiceRequest")
        for end in ("Cancelled", "Created", "Updated")
    },
    **{
        f"Referral{end}": "ServiceRequest"
        for end in (
            "Accepted",
            "Completed",
            "ConfirmCancelled",
            "Declined",
            "RequestCancelled",
            "Requested",
            "ScheduleUpdated",
        )
    },
    **{
        f"PatientAdmin{end}": "Encounter"
        for end in ("Arrived", "Discharged", "PreAdmitted", "Registered", "Transferred")
    },
    **{f"PatientAdmin{end}": None for end in ("Created", "Merged", "Updated")},
    "ResultCreated": "Observation",
    **{f"SchedulingAppointment{end}": "Appointment" for end in ("Booked", "Cancelled", "Updated")},
}

# Names of the form used until 2024, in `eventCoding` instead of `eventUri`.
FHIR_CODED_EVENTS: Final[dict[str, str | None]] = {
    "PatientAdmin-event-patient-registered": "Encounter",
    "Scheduling-event-appointment-booked": "Appointment",
}
