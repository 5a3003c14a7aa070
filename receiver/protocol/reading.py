"""Reads a body into a Message: Redox's Data Model envelope, or a FHIR message Bundle.

Only the envelope is decoded: real payloads do not always obey the published schema, so the rest is the handlers'. May
not judge: whether the source is known or a test wanted is decided elsewhere.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import msgspec

from receiver.errors import Unreadable
from receiver.protocol.message import QUERIES, Message
from receiver.protocol.scanning import check_depth, members

# Names are compared with spaces removed ("Clinical Summary"). Unknown ones are welcome, so only the shape is checked:
# it is what may stand in a metric label, a log line and a pattern.
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ID_LENGTH: Final = 200  # UUIDs have 36; a longer id is somebody's mistake, and cut for the index column only
_URN: Final = "urn:uuid:"

_decode_any: Final = msgspec.json.Decoder()
_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw])


def read(body: bytes) -> Message:
    """The message that `body` is.

    Raises `Unreadable` with the reason that quarantine shows: `empty`, `not_utf8`, `too_deep`, `not_json`,
    `top_not_object`, `top_duplicate_key`, `no_meta`, `meta_not_object`, `meta_duplicate_key`, `kind_missing`,
    `kind_malformed`, `fhir_not_message`. Where somebody waits for an answer all the same, it carries the query's kind.
    """
    if not body:
        raise Unreadable("empty")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise Unreadable("not_utf8") from exc
    check_depth(body)
    try:
        top = members(body, where="top")
        if "Meta" in top:
            return _data_model(body, *top["Meta"])
    except Unreadable as exc:
        exc.query = _perhaps_query(body) if exc.reason.endswith("duplicate_key") else None
        raise
    if "resourceType" in top:
        return _fhir(body, top)
    raise Unreadable("no_meta")


def normalise_source(identity: str) -> str:
    """A source's id as it is registered and compared: without `urn:uuid:`, a UUID in lower case, else as it stands."""
    identity = identity.removeprefix(_URN)
    return identity.lower() if _UUID.fullmatch(identity) else identity


def _data_model(body: bytes, start: int, end: int) -> Message:
    """Redox, Data Model messages: `{"Meta": {…}, …}`."""
    text = body[start:end]
    spans = members(text, where="meta")
    meta = {name: _value(text[slice(*spans[name])]) for name in _META & spans.keys()}
    kind = f"{_name(meta.get('DataModel'))}.{_name(meta.get('EventType'))}"
    log = _first(meta.get("Logs"))
    source = _mapping(meta.get("Source"))
    source_id = _id(source.get("ID"))
    message_id = _id(_mapping(meta.get("Message")).get("ID"))
    log_id = _id(log.get("ID"))
    outside = sha256(body[:start] + body[end:]).digest()
    # No key is prescribed: the log's id names the message, Message.ID is older; else only equal bytes are a repeat.
    if log_id is not None:
        key, expires = _key("log", log_id), False
    elif message_id is not None:
        key, expires = _key("message", f"{source_id}\0{message_id}"), False
    else:
        key, expires = sha256(body).digest(), True
    return Message(
        kind=kind, fhir=False, query=kind in QUERIES,
        source_id=None if source_id is None else normalise_source(source_id), source_name=_id(source.get("Name")),
        log_id=log_id, attempt_id=_id(log.get("AttemptID")), message_id=message_id,
        transmission_id=_id(_mapping(meta.get("Transmission")).get("ID")), facility=_id(meta.get("FacilityCode")),
        event_time=_time(meta.get("EventDateTime")), test=meta.get("Test") is True,
        key=key, key_expires=expires, outside=outside, raw=body)


# The members of Meta that are read. Nothing else of it is decoded.
_META: Final = frozenset({"DataModel", "EventType", "EventDateTime", "Test", "Source", "Logs", "Message", "Transmission",
                          "FacilityCode"})


def _fhir(body: bytes, top: dict[str, tuple[int, int]]) -> Message:
    """Redox, FHIR notifications: a Bundle of type `message` whose first entry is a MessageHeader."""
    header = _mapping(None)
    resource, bundle = (_value(body[slice(*top[name])]) if name in top else None for name in ("resourceType", "type"))
    if (resource, bundle) == ("Bundle", "message") and "entry" in top:
        header = _message_header(body[slice(*top["entry"])])
    if header.get("resourceType") != "MessageHeader":
        raise Unreadable("fhir_not_message")
    # `eventUri` is today's form, `eventCoding` that until 2024; event names have changed, so none is hard-coded.
    uri = header.get("eventUri")
    event = uri.rstrip("/").rpartition("/")[2] if isinstance(uri, str) else _mapping(header.get("eventCoding")).get("code")
    source = _mapping(header.get("source"))
    source_id = _id(source.get("endpoint"))
    digest = sha256(body).digest()
    return Message(
        kind=f"FHIR.{_name(event)}", fhir=True, query=False,
        source_id=None if source_id is None else normalise_source(source_id), source_name=_id(source.get("name")),
        log_id=None, attempt_id=None, message_id=None, transmission_id=None, facility=None, event_time=None, test=False,
        key=digest, key_expires=True, outside=digest, raw=body)


def _message_header(entry: bytes) -> dict[str, Any]:
    """The resource of the first of the Bundle's entries; an empty mapping when there is none."""
    try:
        entries = _decode_raws.decode(entry)
    except msgspec.ValidationError:
        return {}
    return _mapping(_mapping(_value(entries[0]) if entries else None).get("resource"))


def _value(text: bytes | msgspec.Raw) -> Any:
    """The decoded value, or None where Python cannot hold it (1e400, an integer of 5,000 digits)."""
    try:
        return _decode_any.decode(text)
    except msgspec.ValidationError:
        return None


def _perhaps_query(body: bytes) -> str | None:
    """The kind, when what duplicate keys leave of the Meta calls itself a query: its asker waits, and gets an error."""
    meta = _mapping(_mapping(_value(body)).get("Meta"))
    try:
        kind = f"{_name(meta.get('DataModel'))}.{_name(meta.get('EventType'))}"
    except Unreadable:
        return None
    return kind if kind in QUERIES else None


def _key(what: str, text: str) -> bytes:
    return sha256(f"{what}\0{text}".encode()).digest()


def _name(value: object) -> str:
    if value is None:
        raise Unreadable("kind_missing")
    name = value.replace(" ", "") if isinstance(value, str) else ""
    if not _NAME.fullmatch(name):
        raise Unreadable("kind_malformed")
    return name


def _id(value: object) -> str | None:
    """An id as an index column can hold it: text without NUL, bounded; numbers as Redox's older samples have them."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).replace("\0", "")[:_ID_LENGTH] or None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(value: object) -> dict[str, Any]:
    return _mapping(value[0]) if isinstance(value, list) and value else {}


def _time(value: object) -> datetime | None:
    """EventDateTime (ISO 8601) in UTC; None for what is no time, or none that PostgreSQL and Python both hold."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
