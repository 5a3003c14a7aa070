"""Parses a body into a ParsedMessage: Redox's Data Model envelope, or a FHIR message Bundle.

Only the envelope is decoded: real payloads do not always match the published schema, so the rest is left to handlers.
Must not decide whether a source or a test message is accepted (see `sources`).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from receiver.errors import Unreadable
from receiver.protocol.digests import sha256
from receiver.protocol.json_limits import check_depth, check_encoding
from receiver.protocol.message import QUERIES, ParsedMessage
from receiver.protocol.scanning import first_element, is_object, members, value
from receiver.protocol.sources import normalize_source

# Names are compared without spaces ("Clinical Summary"). Unknown names are accepted, so only the shape is checked: it
# is safe in a metric label, a log line and a pattern.
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_ID_LENGTH: Final = 200  # UUIDs have 36; a longer id is a mistake, and is cut for the index column

# The members that are decoded; in a Bundle only those of its first entry's resource.
_TOP: Final = frozenset({"Meta", "resourceType", "type", "entry", "id"})
_HEADER: Final = frozenset({"resourceType", "eventUri", "eventCoding", "source", "id"})


class _KindNames(msgspec.Struct):
    DataModel: str = ""
    EventType: str = ""


class _Envelope(msgspec.Struct):
    Meta: _KindNames


_decode_envelope: Final = msgspec.json.Decoder(_Envelope).decode


def read(body: bytes) -> ParsedMessage:
    """Parse `body`.

    Raises `Unreadable` with the reason that quarantine shows: `empty`, `not_utf8`, `too_deep`, `not_json`, `no_meta`,
    `kind_missing`, `kind_malformed`, `fhir_not_message`, and `top_`, `meta_`, `entry_`, `header_` with `not_object` or
    `duplicate_key`. If duplicate keys hide a query, whose sender waits for an answer, the error has the query's kind.
    """
    if not body:
        raise Unreadable("empty")
    check_encoding(body)
    check_depth(body)
    try:
        top = members(body, where="top", wanted=_TOP)
        if "Meta" in top:
            return _data_model(body, *top["Meta"])
    except Unreadable as exc:
        exc.query = _perhaps_query(body) if exc.reason.endswith("duplicate_key") else None
        raise
    if "resourceType" in top:
        return _fhir(body, top)
    raise Unreadable("no_meta")


class _Meta(msgspec.Struct):
    """The decoded members of Meta."""

    DataModel: Any = None
    EventType: Any = None
    EventDateTime: Any = None
    Test: Any = None
    Source: Any = None
    FacilityCode: Any = None
    Logs: Any = None
    Message: Any = None
    Transmission: Any = None


_META: Final = frozenset(_Meta.__struct_fields__)
_decode_meta: Final = msgspec.json.Decoder(_Meta).decode
# A Meta has about a kilobyte. A larger one is not decoded at once: a list in it could take 40 times its size.
_SMALL: Final = 1 << 16


class _MetaPart(msgspec.Struct):
    """The decoded members of objects in Meta and MessageHeader."""

    ID: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    Name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    AttemptID: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    code: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    endpoint: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_part: Final = msgspec.json.Decoder(_MetaPart).decode


def _data_model(body: bytes, start: int, end: int) -> ParsedMessage:
    """Redox, Data Model messages: `{"Meta": {…}, …}`."""
    meta = _meta(body[start:end])
    kind = _kind(meta.DataModel, meta.EventType)
    log, source = _first(meta.Logs), _mapping(meta.Source)
    log_id, message_id = _id(log.get("ID")), _id(_mapping(meta.Message).get("ID"))
    source_id, test = _source(source.get("ID")), meta.Test is not None and meta.Test is not False
    outside = sha256(memoryview(body)[:start], memoryview(body)[end:], _decisive(kind, source_id, test=test))
    # Redox prescribes no key. The log's id identifies the message; Message.ID is older. Without both, only equal bytes
    # are a duplicate.
    if log_id is not None:
        key = log_key(log_id)
    elif message_id is not None:
        key = _key("message", f"{source_id}\0{message_id}")
    else:
        key = sha256(body)
    return ParsedMessage(
        kind=kind,
        fhir=False,
        query=kind in QUERIES,
        source_id=source_id,
        source_name=_id(source.get("Name")),
        log_id=log_id,
        attempt_id=_id(log.get("AttemptID")),
        message_id=message_id,
        transmission_id=_id(_mapping(meta.Transmission).get("ID")),
        facility=_id(meta.FacilityCode),
        event_time=_time(meta.EventDateTime),
        test=test,
        key=key,
        key_expires=log_id is None and message_id is None,
        outside=outside,
        raw=body,
    )


def _fhir(body: bytes, top: dict[str, tuple[int, int]]) -> ParsedMessage:
    """Redox, FHIR notifications: a Bundle of type `message` whose first entry is a MessageHeader."""
    resource, bundle, entries, identity = (
        memoryview(body)[slice(*top[name])] if name in top else memoryview(b"null")
        for name in ("resourceType", "type", "entry", "id")
    )
    header = _message_header(entries) if (value(resource), value(bundle)) == ("Bundle", "message") else {}
    if header.get("resourceType") != "MessageHeader":
        raise Unreadable("fhir_not_message")
    # `eventUri` is the current form, `eventCoding` the form until 2024. Event names have changed: none is hard-coded.
    event = header.get("eventUri")
    if isinstance(event, str):
        event = event.rstrip("/").rpartition("/")[2]
    else:
        event = _mapping(header.get("eventCoding")).get("code")
    source = _mapping(header.get("source"))
    kind, source_id = _kind("FHIR", event), _source(source.get("endpoint"))
    # The ids of the message and of its transmission, if any. Without both, only equal bytes are a duplicate.
    bundle_id, header_id = _id(value(identity)), _id(header.get("id"))
    expires = bundle_id is None and header_id is None
    key = sha256(body) if expires else _key("fhir", f"{bundle_id or ''}\0{header_id or ''}")
    return ParsedMessage(
        kind=kind,
        fhir=True,
        query=False,
        source_id=source_id,
        source_name=_id(source.get("name")),
        log_id=None,
        attempt_id=None,
        message_id=None,
        transmission_id=None,
        facility=None,
        event_time=None,
        test=False,
        key=key,
        key_expires=expires,
        outside=sha256(body, _decisive(kind, source_id, test=False)),
        raw=body,
    )


def _message_header(entries: memoryview) -> dict[str, Any]:
    """Return the decoded members of the resource of the Bundle's first entry; none without an entry.

    It is FHIR's Meta, so duplicate members are refused in it too.
    """
    first = first_element(entries)
    if first is None:
        return {}
    text = bytes(first)
    resource = members(text, where="entry", wanted={"resource"}).get("resource")
    if resource is None:
        return {}
    text = text[slice(*resource)]
    found = members(text, where="header", wanted=_HEADER)
    return {name: _bounded(memoryview(text)[start:end]) for name, (start, end) in found.items()}


def _meta(text: bytes) -> _Meta:
    found = members(text, where="meta", wanted=_META)
    if len(text) <= _SMALL:
        try:
            return _decode_meta(text)
        except msgspec.ValidationError:  # Python cannot represent one of its values: the others are used
            pass
    meta = _Meta(**{name: _bounded(memoryview(text)[start:end]) for name, (start, end) in found.items()})
    if "Test" in found:  # a value that Python cannot represent marks a test too
        meta.Test = text[slice(*found["Test"])] not in (b"null", b"false")
    return meta


def _bounded(text: memoryview) -> Any:
    """Decode a value in bounded memory: the first element of an array, the members of _MetaPart of an object.

    A value that Python cannot represent, or that is too long, is None.
    """
    first = first_element(text)
    return _part(text) if first is None else [_part(first)]


def _part(text: msgspec.Raw | memoryview) -> Any:
    if not is_object(text):
        return value(text)
    part = _decode_part(text)
    return {
        name: value(member)
        for name in _MetaPart.__struct_fields__
        if isinstance(member := getattr(part, name), msgspec.Raw)
    }


def _perhaps_query(body: bytes) -> str | None:
    """Return the kind of a query with duplicate keys: its sender waits for an answer, and gets an error."""
    try:
        meta = _decode_envelope(body).Meta
        kind = _kind(meta.DataModel, meta.EventType)
    except (msgspec.ValidationError, Unreadable):
        return None
    return kind if kind in QUERIES else None


def log_key(log_id: str) -> bytes:
    """Return the key by which duplicates of a message with this `Meta.Logs[].ID` are found."""
    return _key("log", log_id)


def _decisive(kind: str, source_id: str | None, *, test: bool) -> bytes:
    """Return the part of Meta that admission and dispatch depend on, as a suffix of the digested content.

    Messages that differ in it are different messages: a duplicate must not dispatch a stored message about which
    another decision was made. NUL separates it, which neither a JSON document nor a kind or a source's id contains.
    """
    return f"\0{kind}\0{source_id or ''}\0{int(test)}".encode()


def _key(what: str, text: str) -> bytes:
    return sha256(f"{what}\0{text}".encode())


def _kind(model: object, event: object) -> str:
    return f"{_name(model)}.{_name(event)}"


def _name(value: object) -> str:
    if value is None:
        raise Unreadable("kind_missing")
    name = value.replace(" ", "") if isinstance(value, str) else ""
    if not _NAME.fullmatch(name):
        raise Unreadable("kind_malformed")
    return name


def _id(value: object) -> str | None:
    """Return an id for an index column: text without NUL, bounded. Older samples of Redox have numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).replace("\0", "")[:_ID_LENGTH] or None


def _source(value: object) -> str | None:
    identity = _id(value)
    return None if identity is None else normalize_source(identity) or None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(value: object) -> dict[str, Any]:
    return _mapping(value[0]) if isinstance(value, list) and value else {}


def _time(value: object) -> datetime | None:
    """Return EventDateTime (ISO 8601) in UTC; None if PostgreSQL or Python cannot represent it."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
