"""Prepares outgoing Data Model messages: checks them by Redox's rules, adds the source, and encodes them as JSON.

Must not send anything. Must not change the object that the caller passed in. Bytes are sent unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, runtime_checkable

import msgspec

from receiver.outbound.errors import Unsendable
from receiver.protocol.message import QUERIES

SOURCE_HEADER: Final = "Redox-Source-Id"
# The names of Redox's models and events. Any other text may be patient data.
_KIND: Final = re.compile(r"[A-Za-z]{1,40}\.[A-Za-z-]{1,60}")


@runtime_checkable
class Model(Protocol):
    """A Pydantic model, such as the classes of the `redox` and `fhir.resources` packages."""

    def model_dump(self, *, mode: Literal["json"], by_alias: bool, exclude_none: bool) -> dict[str, Any]: ...


Outgoing = Mapping[str, Any] | bytes | Model


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkOnramp:
    """The requester and the purpose, which a network onramp (TEFCA, Carequality) requires in `Meta.Extensions`.

    `organization`: the sender's identifier in the network. `user`: the user's identifier in your system. `role`: a
    SNOMED CT code. `role_name`: its display text. `purpose`: for example "TREATMENT". Redox publishes the four names;
    the shape of the values is the one that other Redox clients send.
    """

    organization: str
    user: str = field(repr=False)
    role: str
    role_name: str | None = None
    purpose: str = "TREATMENT"
    purpose_name: str | None = None

    def extensions(self) -> dict[str, Any]:
        """The four members of `Meta.Extensions`."""
        return {
            "sender-organization-id": _extension("sender-organization-id", string=self.organization),
            "user-id": _extension("user-id", string=self.user),
            "user-role": _extension("user-role", coding=_coding(self.role, self.role_name)),
            "purpose-of-use": _extension("purpose-of-use", coding=_coding(self.purpose, self.purpose_name)),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A message that can be sent: its bytes, and a header with its source if the bytes do not contain it.

    `kind`: model and event, or "unknown" if it must not be shown. `destinations`: their ids at Redox.
    """

    body: bytes = field(repr=False)
    kind: str
    destinations: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)


class _OutboundEnvelope(msgspec.Struct):
    Meta: Any = None


def prepare(
    message: Outgoing, *, query: bool, source: str | None, source_required: bool, onramp: NetworkOnramp | None
) -> Prepared:
    """Prepare a message. Raises Unsendable if Redox would reject it.

    In a dict or model without `Meta.Source.ID`, `source` is added. Bytes are not changed; their source is sent in a
    header.
    """
    whole, meta = _open(message)
    if not isinstance(meta, Mapping):
        raise Unsendable("the message has no Meta object; Redox routes by Meta.DataModel, EventType and Destinations")
    kind, destinations = _check_routing(meta, query)
    named = meta.get("Source")
    missing = not (isinstance(named, Mapping) and named.get("ID"))
    if missing and source is None and source_required:
        raise Unsendable(
            "several API keys exist, and the message has no source: set Meta.Source.ID, or the client's source"
        )
    if isinstance(message, bytes):
        if onramp is not None:
            raise Unsendable(
                "network onramp extensions cannot be added to bytes: pass the message as a dict or a model"
            )
        return Prepared(
            body=message,
            kind=kind,
            destinations=destinations,
            headers={SOURCE_HEADER: source} if missing and source else {},
        )
    filled: dict[str, Any] = dict(meta)
    if missing and source is not None:
        filled["Source"] = {**(named if isinstance(named, Mapping) else {}), "ID": source}
    if onramp is not None:
        present = meta.get("Extensions")
        filled["Extensions"] = {**(present if isinstance(present, Mapping) else {}), **onramp.extensions()}
    return Prepared(body=encode({**whole, "Meta": filled}), kind=kind, destinations=destinations)


def as_dict(message: Mapping[str, Any] | Model) -> Mapping[str, Any]:
    """Return the message as a mapping. Raises Unsendable for an unsupported type."""
    if isinstance(message, Mapping):
        return message
    if not isinstance(message, Model):
        raise Unsendable(f"a {type(message).__name__} cannot be sent: pass a dict, bytes, or a Pydantic model")
    composed = getattr(message, "to_redox", None)  # the composable classes of redox.generic
    return (composed() if composed else message).model_dump(mode="json", by_alias=True, exclude_none=True)


def encode(whole: Mapping[str, Any]) -> bytes:
    """Encode as compact JSON in UTF-8. Raises Unsendable for NaN, a datetime, a lone surrogate, a cycle, and so on."""
    try:
        return json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise Unsendable(f"the message has a value that JSON cannot represent ({type(exc).__name__})") from exc


def _open(message: Outgoing) -> tuple[Mapping[str, Any], Any]:
    """Return the message as a mapping, and its Meta. For bytes, only the Meta is decoded."""
    if not isinstance(message, bytes):
        whole = as_dict(message)
        return whole, whole.get("Meta")
    try:
        message.decode()
        return {}, msgspec.json.decode(message, type=_OutboundEnvelope).Meta
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        raise Unsendable("the bytes are not a valid JSON object in UTF-8") from None


def _check_routing(meta: Mapping[str, Any], query: bool) -> tuple[str, tuple[str, ...]]:
    for name in ("DataModel", "EventType"):
        if not isinstance(meta.get(name), str) or not meta[name]:
            raise Unsendable(f"the message has no Meta.{name}")
    destinations = meta.get("Destinations")
    if not isinstance(destinations, Sequence) or isinstance(destinations, str) or not destinations:
        raise Unsendable("the message has no destination: set Meta.Destinations[].ID")
    for destination in destinations:
        if not isinstance(destination, Mapping) or not isinstance(destination.get("ID"), str) or not destination["ID"]:
            raise Unsendable("a destination in Meta.Destinations has no ID")
    kind = f"{meta['DataModel']}.{meta['EventType']}".replace(" ", "")
    if (query or kind in QUERIES) and len(destinations) != 1:
        raise Unsendable("a query must have exactly one destination, but this one has several")
    return kind if _KIND.fullmatch(kind) else "unknown", tuple(destination["ID"] for destination in destinations)


def _extension(name: str, **value: Any) -> dict[str, Any]:
    return {"url": f"https://api.redoxengine.com/extensions/{name}", **value}


def _coding(code: str, display: str | None) -> dict[str, str]:
    return {"code": code} if display is None else {"code": code, "display": display}
