"""The values that a request becomes on its way: Head, Inbound, Verified, Message, Reply.

Types carry the proof: the ledger takes a `Verified`, and only `receiver.protocol.verification` makes one.

Must not do anything: plain values.
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

# A destination's name is part of its URL and of lane names; the registry accepts nothing else.
DESTINATION_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


class Head(Value, frozen=True, kw_only=True):
    """What is known of a request before its body is read.

    `headers` has lower-case names; the values are latin-1 text, as WSGI gives them (PEP 3333), so that
    `.encode("latin-1")` is what was on the wire. A header sent twice arrives as one value, "a,b". `target` is the raw
    path, `query` the raw query string, both as sent. The query may not be logged: a GET handshake carries the token
    there. `proxied`: whether the connection comes from a proxy that we trust, or over a Unix socket.
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
        """The value of header `name` (lower case) as it was on the wire, or None."""
        value = self.headers.get(name)
        return None if value is None else value.encode("latin-1", "replace")


class Inbound(Value, frozen=True, kw_only=True):
    """A whole request: its head and exactly the bytes of its body."""

    hidden = frozenset({"body"})

    head: Head
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Nonce:
    """What may be used once: who lets it in remembers `key`, 32 bytes, until then, and refuses it a second time."""

    key: bytes = field(repr=False)
    until: datetime

    @classmethod
    def of(cls, space: str, value: bytes, until: datetime) -> Self:
        """For `value`, which is unique in `space`."""
        return cls(key=sha256(space.encode() + b"\0" + value).digest(), until=until)


class Verified(Value, frozen=True, kw_only=True):
    """The proof that a request is Redox's: which credentials vouched for it, and of which kinds they are.

    `once` holds a signature that was made for this one request, where it holds within a window of time: the same again
    is a replay. A notification that comes again is a duplicate and does no harm; a query would be answered again.
    """

    credentials: tuple[int, ...]
    kinds: frozenset[str]
    nonces: tuple[Nonce, ...] = ()


class ParsedMessage(Value, frozen=True, kw_only=True):
    """A Redox message, Data Model or FHIR, in one shape. Nothing of the patient's is in here but inside `raw`.

    `kind` is `PatientAdmin.Arrival` (spaces removed from the names) or `FHIR.<event>`. `source_id` is normalised (a
    UUID in lower case, without `urn:uuid:`) or None when the message names no source. `key` is what duplicates have in
    common and `outside` the SHA-256 of all bytes outside Meta, of the kind, the source and the test flag: the same key
    with another `outside` is another message.
    `key_expires` says that the key is only a digest of the body, which may be meant to come again.
    Ids and times are claims of the sender, cleaned for index columns (no NUL, bounded); the exact bytes are `raw`.
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
        """(DataModel, EventType) that an answer to this query bears (Redox: `EventType` + "Response")."""
        model, _, event = self.kind.partition(".")
        return model, response_event(model, event)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the endpoint writes: a status, a body and its media type, and whether the connection must close."""

    status: int
    body: bytes = field(default=b"", repr=False)
    media: str = "text/plain; charset=utf-8"
    retry_after: int | None = None
    close: bool = False


# Redox, synchronous queries: everything else is a notification. Names with spaces removed.
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
    """The EventType of the answer to the query `model.event`."""
    return QUERIES.get(f"{model}.{event}", f"{event}Response")


def error_body(*, kind: str | None, text: str) -> dict[str, Any]:
    """A body in Redox's shape that says why a query was not answered. `text` is a fixed sentence of ours."""
    model, _, event = (kind or "").partition(".")
    meta: dict[str, Any] = {"Errors": [{"ID": None, "Text": text, "Type": "application", "Module": "redox-receiver"}]}
    if kind:
        meta = {"DataModel": model, "EventType": response_event(model, event), **meta}
    return {"Meta": meta}
