"""Templates: for each kind, the structure of Redox's schema with values in its fields, built once.

The structures are those of the typed classes in the `redox` package. Importing all of them takes seconds, so only the
package of the requested Data Model is imported, at first use. Must not fill a field for which `field_values` and
`codes` have no entry: optional fields are omitted.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin

from receiver.samples.codes import choose, measured, topic
from receiver.samples.field_values import (
    FACILITY,
    FACILITY_CODE,
    WORDS,
    Owner,
    exact,
    general,
    patient_identifiers,
    previous_identifiers,
)
from receiver.samples.kinds import WIRE_NAMES
from receiver.samples.scenario import Node

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

# Redox documents that these correspond to their batches, for one transaction. The `redox` package has classes for the
# batches only.
_LIKE: Final = {"Claim.Payment": "Claim.PaymentBatch", "Claim.Submission": "Claim.SubmissionBatch"}

# Fields with little information: second codings, free-form extensions, a doctor's full contact data, and the less
# common sections of a clinical summary.
_LEFT_OUT: Final = frozenset(
    {
        "AltCodes",
        "Extensions",
        "ReferenceNumbers",
        "DepartmentIdentifiers",
        "FacilityIdentifiers",
        "DeathDateTime",
        "AdmissionDiagnosis",
        "AdvanceDirectives",
        "Assessment",
        "CareTeams",
        "CauseOfDeath",
        "Custodian",
        "DischargeDiagnosis",
        "DischargeMedications",
        "FamilyHistory",
        "FunctionalStatus",
        "Goals",
        "HealthConcerns",
        "Interventions",
        "MedicalEquipment",
        "MedicationsAdministered",
        "PlanOfCare",
        "ResolvedProblems",
        "SocialHistory",
        "SupplyOrder",
        "TargetSite",
        "Authenticator",
        "Rate",
        "RelatesTo",
        "Reaction",
        "Confidentiality",
    }
)
_LEFT_OUT_OF_STAFF: Final = frozenset({"Address", "Location", "EmailAddresses"})

NOBODY: Final = Owner(who="nobody")
_DOCTOR: Final = Owner(who="staff")
_WHOSE: Final[dict[str, Owner]] = {
    **dict.fromkeys(
        ("Patient", "Patients", "PotentialMatches", "Insured", "Subscribers", "Spouse"), Owner(who="patient")
    ),
    **dict.fromkeys(("Guarantor", "Contacts"), Owner(who="relative")),
    **dict.fromkeys(
        (
            "Company",
            "Employer",
            "Organization",
            "Organizations",
            "OrderingFacility",
            "Location",
            "Locations",
            "PreviousLocation",
            "DischargeLocation",
            "Receiver",
            "Submitter",
            "BillingProvider",
            "Producer",
            "Pharmacy",
            "Vendor",
            "Sponsor",
        ),
        Owner(who="place"),
    ),
    **dict.fromkeys(("Provider", "Providers"), _DOCTOR),
    # The referring doctor is the patient's own. The attending and consulting doctors are others.
    "AttendingProvider": Owner(who="staff", member=1),
    "ConsultingProvider": Owner(who="staff", member=2),
    "AdditionalStaff": Owner(who="staff", member=3),
}
_CONCEPT_FIELDS: Final = {
    "Code": "code",
    "CodeSystem": "system",
    "CodeSystemName": "system_name",
    "Codeset": "system_name",
    "CodeSet": "system_name",
    "Name": "name",
    "Description": "name",
    "Text": "name",
    "DefaultCode": "code",
    "DefaultName": "name",
}
# For required fields without a matching entry.
_UNKNOWN: Final[dict[type, Node]] = {str: "Unspecified", float: 0, bool: False}
_MEASURED_FIELDS: Final = {"Value": 0, "Units": 1, "Low": 2, "High": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A position in the structure: the field whose members are filled, its parent, its owner and its topic."""

    parent: str
    field: str
    whose: Owner
    about: str | None = None
    coded: bool = False
    depth: int = 0


@cache
def template(kind: str) -> dict[str, Node]:
    """Return the template of a Data Model kind ("PatientAdmin.Arrival"). Raises KeyError for a kind that Redox does not
    have.
    """
    model, event = WIRE_NAMES[kind]
    if model == "Enrichment" and event.startswith("NaturalLanguageProcessing"):
        return {"Meta": _meta(model, event), **_language(event)}
    cls = _event_class(_LIKE.get(kind, kind))
    place = Place(parent="", field=cls.__name__, whose=_DOCTOR if model == "SSO" else NOBODY)
    return {"Meta": _meta(model, event, cls.model_fields["Meta"].annotation), **fill(cls, place)}


def _event_class(kind: str) -> type[BaseModel]:
    model, _, event = kind.partition(".")
    package = import_module(f"redox.{model.lower()}")
    found: type[BaseModel] = getattr(package, "SignOn" if event == "Sign-on" else event)
    return found


def _fields(cls: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(field.alias or name, field) for name, field in cls.model_fields.items()]


def _meta(model: str, event: str, cls: Any = None) -> dict[str, Node]:
    """Return Meta: the members of every Data Model message, and those of this event's class."""
    meta: dict[str, Node] = {
        "DataModel": model,
        "EventType": event,
        "EventDateTime": lambda case: case.time(),
        "Test": True,
        "Source": {"ID": "", "Name": f"{FACILITY} EHR"},
        "Destinations": [{"ID": "2f0c5a8e-9b1d-4c35-8a71-5d4e6f708192", "Name": "redox-receiver"}],
        "Logs": [{"ID": lambda case: case.uuid("log"), "AttemptID": lambda case: case.uuid("attempt")}],
        "Message": {"ID": lambda case: case.number(f"{case.kind} message", 10)},
        "Transmission": {"ID": lambda case: case.number(f"{case.kind} transmission", 10)},
        "FacilityCode": FACILITY_CODE,
    }
    if cls is not None:
        names = [name for name, _ in _fields(cls)]
        meta |= {name: WORDS[name] for name in names if name not in meta and name in WORDS}
        if "Logs" not in names:  # a sign-on has a session instead
            del meta["Logs"]
    return meta


def _language(event: str) -> dict[str, Node]:
    """Return the template of a natural language event. Redox publishes no fields, so a note replaces them."""
    body: dict[str, Node] = {
        "Patient": {"Identifiers": patient_identifiers()},
        "Text": "Patient reports chest pain since this morning.",
    }
    if event.endswith("Response"):
        body["Entities"] = [{"Text": "chest pain", "Code": "R07.9", "Codeset": "ICD-10"}]
    return body


def fill(cls: type[BaseModel], place: Place) -> dict[str, Node]:
    """Return the members of `cls` at `place`, without those that have no entry. Meta is made separately."""
    filled: dict[str, Node] = {}
    for name, field in _fields(cls):
        node = None if name == "Meta" else _field(name, field.annotation, place, field.is_required())
        if node is not None:
            filled[name] = node
    return filled


def _field(name: str, annotation: Any, place: Place, required: bool) -> Node:
    left_out = _LEFT_OUT | (_LEFT_OUT_OF_STAFF if place.whose.who == "staff" and place.depth > 1 else frozenset())
    if name in left_out and not required:
        return None
    inner, many = _unwrap(annotation)
    if many and place.whose.who == "patient" and name in ("Identifiers", "PreviousIdentifiers"):
        return patient_identifiers() if name == "Identifiers" else previous_identifiers()
    if hasattr(inner, "model_fields"):
        node: Node = fill(inner, _step(name, inner, place)) or ({} if required else None)
    else:
        node = _leaf(name, inner, place)
        if node is None and required:
            node = _UNKNOWN[inner]
    return [node] if many and node is not None else node


def _step(name: str, cls: type[BaseModel], place: Place) -> Place:
    names = {member for member, _ in _fields(cls)}
    about = topic(place.field, name)
    coded = about is not None and bool(names & {"Code", "DefaultCode"})
    whose = _WHOSE.get(name) or (_DOCTOR if names & {"LastName", "NPI"} and name != "Demographics" else place.whose)
    return replace(
        place,
        parent=place.field,
        field=name,
        whose=whose,
        depth=place.depth + 1,
        about=about if coded else place.about,
        coded=coded,
    )


def _leaf(name: str, kind: type, place: Place) -> Node:
    found = exact(place.parent, place.field, name)
    about = place.about
    if found is None and about is not None:
        if place.coded and name in _CONCEPT_FIELDS:
            attribute = _CONCEPT_FIELDS[name]
            return lambda case: str(getattr(choose(case, about), attribute))
        if name in _MEASURED_FIELDS:
            index = _MEASURED_FIELDS[name]
            return lambda case: _as(kind, measured(case, about)[index])
    if found is None:
        found = general(name, place.whose)
    if callable(found) or found is None:
        return found if kind is str else None
    return _as(kind, found)


def _as(kind: type, value: Any) -> str | float | bool | None:
    """Return the value in the type that the schema requires, or None if it cannot be converted."""
    if kind is str:
        return str(value)
    if isinstance(value, bool):
        return value if kind is bool else None
    if isinstance(value, str):
        return int(value) if kind is float and value.isdigit() else None
    return value if kind is float and isinstance(value, int | float) else None


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """Return the type inside `T | None` and `list[T]`, and whether it was a list."""
    origin = get_origin(annotation)
    if origin is list:
        return _unwrap(get_args(annotation)[0])[0], True
    if origin in (Union, types.UnionType):
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        return _unwrap(inner[0])
    return annotation, False
