"""Finds the patients' identifiers in a message: (authority, type, value), for keyed digests.

Lists are read one element at a time, and only small values are decoded: memory does not grow with the body, and a value
that Python cannot represent hides only itself. Must not store or format the identifiers: they are only digested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from receiver.protocol.scanning import first_element, is_object, objects, value

# More than any real message has.
MAX_IDENTIFIERS: Final = 1000
# Bytes of an identifier or its type, as JSON text. A longer one is not an identifier.
MAX_LENGTH: Final = 1000

Part = msgspec.Raw | msgspec.UnsetType


class PatientIdentifier(NamedTuple):
    """One identifier of a patient. `authority`: who assigned it; None where the message does not say, so its source."""

    authority: str | None
    type: str
    value: str


S = TypeVar("S", bound=msgspec.Struct)
_ABSENT: Final = msgspec.UNSET


class _PatientBody(msgspec.Struct):
    """The members with patients. Here and below, other members are skipped."""

    Patient: Part = _ABSENT
    Patients: Part = _ABSENT
    entry: Part = _ABSENT


class _Patient(msgspec.Struct):
    Identifiers: Part = _ABSENT


class _Identifier(msgspec.Struct):
    ID: Part = _ABSENT
    IDType: Part = _ABSENT


class _Entry(msgspec.Struct):
    resource: Part = _ABSENT


class _Resource(msgspec.Struct):
    resourceType: Part = _ABSENT  # noqa: N815 - FHIR's name
    identifier: Part = _ABSENT


class _FhirIdentifier(msgspec.Struct):
    type: Part = _ABSENT
    system: Part = _ABSENT
    value: Part = _ABSENT


class _Type(msgspec.Struct):
    coding: Part = _ABSENT


class _Coding(msgspec.Struct):
    code: Part = _ABSENT


_body: Final = msgspec.json.Decoder(_PatientBody)
_patient: Final = msgspec.json.Decoder(_Patient)
_identifier: Final = msgspec.json.Decoder(_Identifier)
_entry: Final = msgspec.json.Decoder(_Entry)
_resource: Final = msgspec.json.Decoder(_Resource)
_fhir_identifier: Final = msgspec.json.Decoder(_FhirIdentifier)
_type: Final = msgspec.json.Decoder(_Type)
_coding: Final = msgspec.json.Decoder(_Coding)


def identifiers(body: bytes) -> Iterator[PatientIdentifier]:
    """Return the identifiers in a body that was parsed without error, in their order, each once.

    Redox, Data Model: `Patient.Identifiers[]{ID, IDType}` (`Patients[]` in a few models). FHIR: `identifier[]` of every
    Patient resource; the type is the code of its type, or its system, and its system is the authority. At most
    MAX_IDENTIFIERS.
    """
    found: set[PatientIdentifier] = set()
    for each in _all(body):
        if each not in found:
            found.add(each)
            yield each
            if len(found) == MAX_IDENTIFIERS:
                return


def _all(body: bytes) -> Iterator[PatientIdentifier]:
    top = _body.decode(body)
    yield from _of_patient(top.Patient)
    for patient in _objects(top.Patients, b'"Identifiers"'):
        yield from _of_patient(patient)
    # Without one of these, no resource can be a Patient.
    if b'"Patient"' in body or b"\\u" in body:
        for entry in _objects(top.entry, b'"Patient"'):
            yield from _of_resource(_of(_entry, entry).resource)


def _of_patient(text: Part | memoryview) -> Iterator[PatientIdentifier]:
    for each in _objects(_of(_patient, text).Identifiers, b'"ID"'):
        identifier = _of(_identifier, each)
        yield from _one(None, _scalar(identifier.IDType), _scalar(identifier.ID))


def _of_resource(text: Part) -> Iterator[PatientIdentifier]:
    resource = _of(_resource, text)
    if _scalar(resource.resourceType) == "Patient":
        for each in _objects(resource.identifier, b'"value"'):
            identifier = _of(_fhir_identifier, each)
            yield from _one(_scalar(identifier.system), _fhir_type(identifier), _scalar(identifier.value))


def _fhir_type(identifier: _FhirIdentifier) -> Any:
    codings = _of(_type, identifier.type).coding
    first = None if isinstance(codings, msgspec.UnsetType) else first_element(codings)
    return (None if first is None else _scalar(_of(_coding, first).code)) or _scalar(identifier.system)


def _one(authority: Any, kind: Any, identifier: Any) -> Iterator[PatientIdentifier]:
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if isinstance(identifier, str) and identifier:
        yield PatientIdentifier(
            authority=authority if isinstance(authority, str) and authority else None,
            type=kind if isinstance(kind, str) else "",
            value=identifier,
        )


def _of(decoder: msgspec.json.Decoder[S], text: Part | memoryview) -> S:
    """Return the decoded members of an object; none for any other value, or an absent one."""
    if isinstance(text, msgspec.UnsetType) or not is_object(text):
        return decoder.type()
    return decoder.decode(text)


def _objects(text: Part, holding: bytes) -> Iterator[msgspec.Raw | memoryview]:
    return iter(()) if isinstance(text, msgspec.UnsetType) else objects(text, holding=holding)


def _scalar(text: Part) -> Any:
    return None if isinstance(text, msgspec.UnsetType) else value(text, longest=MAX_LENGTH)
