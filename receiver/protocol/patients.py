"""Finds the patients' identifiers in a message: (type, value) pairs, for keyed digests alone.

May not keep or format them: what is returned here goes into a MAC and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

# More than any real message names; a bound against made-up ones.
MAX_IDENTIFIERS: Final = 1000


class _Body(msgspec.Struct):
    """The members that hold patients: everything else of the body is passed over."""

    Patient: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    Patients: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    entry: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode: Final = msgspec.json.Decoder(_Body)


def identifiers(body: bytes) -> list[tuple[str, str]]:
    """The (type, value) pairs in a body that was read without error, in the order of the body, each once.

    Redox, Data Model: `Patient.Identifiers[]{ID, IDType}` (`Patients[]` in a few models). FHIR: `identifier[]` of every
    Patient resource; its type is the code of its type, or its system.
    """
    found: dict[tuple[str, str], None] = {}
    for pair in _pairs(_decode.decode(body)):
        found[pair] = None
        if len(found) == MAX_IDENTIFIERS:
            break
    return list(found)


def _pairs(body: _Body) -> Iterator[tuple[str, str]]:
    patients = [_value(body.Patient), *_list(_value(body.Patients))]
    for patient in patients:
        for identifier in _list(_get(patient, "Identifiers")):
            yield from _pair(_get(identifier, "IDType"), _get(identifier, "ID"))
    for entry in _list(_value(body.entry)):
        resource = _get(entry, "resource")
        if _get(resource, "resourceType") == "Patient":
            for identifier in _list(_get(resource, "identifier")):
                yield from _pair(_fhir_type(identifier), _get(identifier, "value"))


def _fhir_type(identifier: Any) -> Any:
    codings = _list(_get(_get(identifier, "type"), "coding"))
    return (_get(codings[0], "code") if codings else None) or _get(identifier, "system")


def _pair(kind: Any, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value:
        yield kind if isinstance(kind, str) else "", value


def _value(raw: msgspec.Raw | msgspec.UnsetType) -> Any:
    try:
        return None if isinstance(raw, msgspec.UnsetType) else msgspec.json.decode(raw)
    except msgspec.ValidationError:  # a number in it that Python cannot hold
        return None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
