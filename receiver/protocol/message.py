"""The values of a request on its path: Head, Inbound, Verified, ParsedMessage, Reply.

The types carry the proof: the ledger takes a `Verified`, and only `receiver.protocol.verification` makes one.

Must not have behavior: plain values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, Literal, Self

from receiver.protocol.values import Value

Method = Literal["GET", "POST"]

# A destination's name is part of its URL and of lane names. The registry accepts no other name.
DESTINATION_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


class Head(Value, frozen=True, kw_only=True):
    """A request without its body.

    `headers`: lower-case name → value as latin-1 text, as in WSGI (PEP 3333): `.encode("latin-1")` returns the bytes on
    the wire. A header that was sent twice has one value, "a,b". `target`: the raw path. `query`: the raw query string,
    which must not be logged, because the token of a GET handshake is there. `proxied`: whether the connection comes
    from a trusted proxy or over a Unix socket.
    """

    hidden = frozenset({"headers", "target", "query"})

    destination: str
    method: Method
    headers: Mapping[str, str]
    target: str
    query: str
    peer: str
    received_at: datetime
    proxied: bool = False

    def header(self, name: str) -> bytes | None:
        """Return the value of header `name` (lower case) as on the wire, or None."""
        value = self.headers.get(name)
        return None if value is None else value.encode("latin-1", "replace")


class Inbound(Value, frozen=True, kw_only=True):
    """A whole request: its head, and the exact bytes of its body."""

    hidden = frozenset({"body"})

    head: Head
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Nonce:
    """A value that may be used once. The caller stores `key`, 32 bytes, until that time, and refuses a known one."""

    key: bytes = field(repr=False)
    until: datetime

    @classmethod
    def of(cls, space: str, value: bytes, until: datetime) -> Self:
        """Return the nonce of `value`, which is unique in `space`."""
        return cls(key=sha256(space.encode() + b"\0" + value).digest(), until=until)


class Verified(Value, frozen=True, kw_only=True):
    """The proof that a request is Redox's: the credentials that verified it, and their kinds.

    `nonces`: signatures of this one request that are valid for a limited time. The same signature again is a replay: a
    repeated notification is a harmless duplicate, but a repeated query would be answered again.
    """

    credentials: tuple[int, ...]
    kinds: frozenset[str]
    nonces: tuple[Nonce, ...] = ()


class ParsedMessage(Value, frozen=True, kw_only=True):
    """A message of Redox, Data Model or FHIR, in one form. Patients' data is only in `raw`.

    `kind`: `PatientAdmin.Arrival` (names without spaces) or `FHIR.<event>`. `source_id`: normalized (a UUID in lower
    case, without `urn:uuid:`), or None if the message names no source. `key`: equal for duplicates. `outside`: SHA-256
    of all bytes outside Meta, the kind, the source and the test flag; the same key with another `outside` is another
    message. Both reveal content that can be guessed, so the storage keeps an HMAC of each. `key_expires`: the key is
    only a digest of the body, and an equal body may be a new message later. Ids and times come from the sender, cleaned
    for index columns (no NUL, bounded). `raw`: the exact bytes.
    """

    hidden = frozenset({"source_name", "key", "outside", "raw"})

    kind: str
    fhir: bool
    query: bool
    source_id: str | None
    source_name: str | None
    log_id: str | None
    attempt_id: str | None
    message_id: str | None
    transmission_id: str | None
    facility: str | None
    event_time: datetime | None
    test: bool
    key: bytes
    key_expires: bool
    outside: bytes
    raw: bytes

    @property
    def response_kind(self) -> tuple[str, str]:
        """(DataModel, EventType) of the answer to this query (Redox: `EventType` + "Response")."""
        model, _, event = self.kind.partition(".")
        return model, response_event(model, event)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The endpoint's answer: status, body and media type, and whether the connection must be closed."""

    status: int
    body: bytes = field(default=b"", repr=False)
    media: str = "text/plain; charset=utf-8"
    retry_after: int | None = None
    close: bool = False


# Redox, synchronous queries: query → the EventType of its answer. Names without spaces. All others are notifications.
QUERIES: Final[Mapping[str, str]] = {
    "ClinicalSummary.PatientQuery": "PatientQueryResponse",
    "ClinicalSummary.VisitQuery": "VisitQueryResponse",
    "ClinicalSummary.DocumentQuery": "DocumentQueryResponse",
    "ClinicalSummary.DocumentGet": "DocumentGetResponse",
    "ClinicalDecisions.Request": "Response",
    "Media.Query": "QueryResponse",
    "Notes.Query": "QueryResponse",
    "Order.Query": "QueryResponse",
    "Organization.Query": "QueryResponse",
    "Referral.Query": "QueryResponse",
    "Results.Query": "QueryResponse",
    "PatientAdmin.CensusQuery": "CensusQueryResponse",
    "PatientAdmin.VisitQuery": "VisitQueryResponse",
    "PatientSearch.Query": "Response",
    "PatientSearch.LocationQuery": "LocationQueryResponse",
    "Provider.ProviderQuery": "ProviderQueryResponse",
    "Scheduling.AvailableSlots": "AvailableSlotsResponse",
    "Scheduling.Booked": "BookedResponse",
    "SSO.Sign-on": "Sign-on",
    "Vaccination.PatientQuery": "PatientQueryResponse",
    "Enrichment.NaturalLanguageProcessingQuery": "NaturalLanguageProcessingQueryResponse",
    "Enrichment.NormalizationQuery": "NormalizationQueryResponse",
}


def response_event(model: str, event: str) -> str:
    """Return the EventType of the answer to the query `model.event`."""
    return QUERIES.get(f"{model}.{event}", f"{event}Response")


def error_body(*, kind: str | None, text: str) -> dict[str, Any]:
    """Return a body in Redox's format that explains why a query was not answered. `text`: a fixed sentence."""
    model, _, event = (kind or "").partition(".")
    meta: dict[str, Any] = {"Errors": [{"ID": None, "Text": text, "Type": "application", "Module": "redox-receiver"}]}
    if kind:
        meta = {"DataModel": model, "EventType": response_event(model, event), **meta}
    return {"Meta": meta}
