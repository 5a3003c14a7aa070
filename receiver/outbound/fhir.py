"""FHIR R4 through Redox: read, search by POST, operations, message bundles.

Must not send anything itself: it makes paths and bodies, and passes them to the client's call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar, get_args
from urllib.parse import urlencode

from receiver.outbound.calls import Call
from receiver.outbound.errors import Unsendable
from receiver.outbound.messages import Model, Outgoing, as_dict, encode

Environment = Literal["Development", "Staging", "Production"]
Result = TypeVar("Result")

_MEDIA: Final = "application/fhir+json"
# Each part of a path must match its grammar, so that no value can change the target.
_SLUG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_RESOURCE: Final = re.compile(r"[A-Z][A-Za-z]{1,63}")
_ID: Final = re.compile(r"[A-Za-z0-9\-.]{1,64}")  # FHIR R4: the id type
_OPERATION: Final = re.compile(r"\$[A-Za-z][A-Za-z0-9-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FhirDestination(Generic[Result]):
    """The FHIR resources of one destination. Methods of a client return the Answer; those of an outbox return the
    request's id.

    They raise the errors of receiver.outbound.errors.
    """

    carry_out: Callable[[Call], Result] = field(repr=False)
    slug: str
    environment: Environment

    def __post_init__(self) -> None:
        _check(_SLUG, self.slug, "the destination's slug, as the Redox dashboard shows it")
        if self.environment not in get_args(Environment):
            raise Unsendable(f"the environment must be one of {', '.join(get_args(Environment))}")

    def read(self, resource: str, resource_id: str) -> Result:
        """Read one resource."""
        _check(_ID, resource_id, "a FHIR id")
        if not resource_id.strip("."):
            raise Unsendable("a FHIR id must not consist of dots only")
        return self._call("GET", resource, resource_id, {"Accept": _MEDIA}, None)

    def search(self, resource: str, parameters: Mapping[str, str | Sequence[str]]) -> Result:
        """Search by POST, so that no URL contains the search parameters. `answer.data` is a Bundle."""
        return self._call(
            "POST",
            resource,
            "_search",
            {"Accept": _MEDIA, "Content-Type": "application/x-www-form-urlencoded"},
            urlencode(parameters, doseq=True).encode(),
        )

    def operation(self, resource: str, operation: str, body: Outgoing) -> Result:
        """Call an operation, such as `$patient-update`, with a FHIR resource."""
        _check(_OPERATION, operation, "an operation's name, such as $patient-update")
        return self._call("POST", resource, operation, {"Accept": _MEDIA, "Content-Type": _MEDIA}, _fhir_bytes(body))

    def message(self, resource: str, operation: str, bundle: Mapping[str, object] | Model) -> Result:
        """Write back: call an operation with a message Bundle, whose first entry is a MessageHeader."""
        whole = as_dict(bundle)
        entries = whole.get("entry")
        first = entries[0] if isinstance(entries, list) and entries else None
        resource_in = first.get("resource") if isinstance(first, Mapping) else None
        header = isinstance(resource_in, Mapping) and resource_in.get("resourceType") == "MessageHeader"
        if whole.get("resourceType") != "Bundle" or whole.get("type") != "message" or not header:
            raise Unsendable(
                "the bundle is not valid: use a Bundle of type message whose first entry is a MessageHeader"
            )
        return self.operation(resource, operation, whole)

    def _call(
        self, method: Literal["GET", "POST"], resource: str, rest: str, headers: Mapping[str, str], body: bytes | None
    ) -> Result:
        _check(_RESOURCE, resource, "a resource type, such as Patient")
        kind = f"FHIR.{resource}" if method == "GET" else f"FHIR.{resource}/{rest}"
        return self.carry_out(
            Call(
                name="fhir",
                kind=kind,
                to=(f"{self.slug}/{self.environment}",),
                method=method,
                headers=headers,
                body=body,
                path=f"/fhir/R4/{self.slug}/{self.environment}/{resource}/{rest}",
            )
        )


def _fhir_bytes(body: Outgoing) -> bytes:
    if isinstance(body, bytes):
        return body
    whole = as_dict(body)
    if not isinstance(whole.get("resourceType"), str):
        raise Unsendable("the value is not a valid FHIR resource: it has no resourceType")
    return encode(whole)


def _check(pattern: re.Pattern[str], value: str, what: str) -> None:
    if not pattern.fullmatch(value):
        raise Unsendable(f"the value is not valid: use {what}")
