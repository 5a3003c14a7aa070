"""A request to Redox made ready: what a client sends at once, and the outbox keeps to send it later.

May not send anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Name = Literal["send", "query", "fhir", "upload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request, the same however often it is sent. `headers` has no authorization: that is the moment's.

    `kind` and `to` may be shown: what it is (PatientAdmin.NewPatient, FHIR.Patient/$patient-update), and the Redox
    destinations that it is for, by id, or by slug and environment. `path` may name a patient. `body` is None of a read,
    and of an upload, whose file travels beside.
    """

    name: Name
    kind: str
    to: tuple[str, ...]
    method: Literal["GET", "POST"]
    path: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
