"""A prepared request to Redox, which a client sends at once and the outbox stores for later.

Must not send anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Name = Literal["send", "query", "fhir", "upload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request, identical in each attempt. `headers` has no Authorization, which is added when the request is sent.

    `kind` and `to` may be shown: `kind` is PatientAdmin.NewPatient or FHIR.Patient/$patient-update, for example; `to`
    holds the destinations at Redox, as ids, or as slug and environment. `path` may name a patient. `body` is None for a
    read, and for an upload, whose file is passed separately.
    """

    name: Name
    kind: str
    to: tuple[str, ...]
    method: Literal["GET", "POST"]
    path: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
