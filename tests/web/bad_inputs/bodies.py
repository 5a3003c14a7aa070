"""Authentic bodies that are not messages, or unusual ones, and their media types."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any, Final

from tests.support.site import SOURCE, message
from tests.web.bad_inputs import ACCEPTED, MIB, Case, Stand, body, case, quarantined

_NOT_JSON: Final = quarantined("not_json")
_NOT_UTF8: Final = quarantined("not_utf8")
_TOO_DEEP: Final = quarantined("too_deep")


def _with(members: bytes) -> Callable[[Stand], bytes]:
    """A message of a patient's arrival with these additional members."""
    return lambda _: message()[:-1] + b", " + members + b"}"


def _meta(text: bytes) -> bytes:
    """A message with these additional members of Meta."""
    return b'{"Meta": {"DataModel": "PatientAdmin", "EventType": "Arrival", "Source": {"ID": "%s"}, %s}}' % (
        SOURCE.encode(),
        text,
    )


def _message(**meta: Any) -> Callable[[Stand], bytes]:
    return lambda _: message(**meta)


def _metadata(stand: Stand) -> bytes:
    """URLs that a server might be made to fetch: a cloud's metadata service, and the trap."""
    urls = ["http://169.254.169.254/latest/meta-data/", stand.trap, stand.trap.replace("http:", "https:")]
    return message()[:-1] + b', "Media": ' + json.dumps({"FileContents": urls[1], "URI": urls}).encode() + b"}"


def _large(_: Stand) -> bytes:
    head = message()[:-1] + b', "Data": "'
    return head + (40 * MIB - len(head) - 2) * b"x" + b'"}'


def _gzipped(_: Stand) -> bytes:
    return gzip.compress(message(), mtime=0)


def _twice(key: str) -> Callable[[Stand], bytes]:
    """A message in which this key of the top or of Meta occurs twice."""

    def make(_: Stand) -> bytes:
        whole = message()
        return (
            whole[:-1] + b', "Meta": {}}'
            if key == "Meta"
            else whole.replace(b'{"DataModel"', b'{"EventType": "Discharge", "DataModel"', 1)
        )

    return make


_INJECTIONS: Final = (
    "'; DROP TABLE messages; --",
    "{{7*7}}${7*7}<%= 7 %>",
    "=cmd|' /C calc'!A0",
    "<script>CANARY</script>",
    "../../etc/passwd",
    "%n%s%x",
    "$(touch /tmp/x)",
    "\u202eCANARY",
    'CANARY\r\n{"event": "x"}',
    "\x1b]0;CANARY\x07\x1b[2J",
)
# Texts that are not times, or times that a column cannot hold.
_TIMES: Final[tuple[object, ...]] = (
    "0000-00-00T00:00:00.000Z",
    "99999-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "CANARY",
    7,
    [],
)
_BOUNDARY: Final = "multipart/form-data; boundary=x"
_FORM: Final = "application/x-www-form-urlencoded"

CASES: Final[tuple[Case, ...]] = (
    case("a gzip body", _NOT_UTF8, body(_gzipped, content_encoding="gzip")),
    case("a gzip bomb", _NOT_UTF8, body(gzip.compress(bytes(100 * MIB), mtime=0), content_encoding="gzip")),
    case("JSON that says it is gzip", ACCEPTED, body(_message(), content_encoding="gzip")),
    case(
        "multipart",
        _NOT_JSON,
        body(
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="CANARY"\r\n\r\nb\r\n--x--\r\n',
            content_type=_BOUNDARY,
        ),
    ),
    case(
        "a form of a million keys",
        _NOT_JSON,
        body(b"&".join(b"a%d=b" % n for n in range(1_000_000)), content_type=_FORM),
    ),
    case(
        "XML",
        _NOT_JSON,
        body(b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>', content_type="text/xml"),
    ),
    *(
        case(f"JSON as {str(media)[:20]}", ACCEPTED, body(_message(), content_type=media))
        for media in (
            "text/xml",
            None,
            "application/fhir+json",
            _FORM,
            _BOUNDARY,
            500 * "x",
            "application/json; charset=utf-16",
        )
    ),
    case("an empty body", quarantined("empty"), body(b"")),
    case("HTML", _NOT_JSON, body(b"<html>CANARY</html>")),
    case("truncated JSON", _NOT_JSON, body(lambda _: message()[:-1])),
    case("trailing data", _NOT_JSON, body(lambda _: message() + b"x")),
    case("two documents", _NOT_JSON, body(lambda _: message() + message())),
    case("a comment", _NOT_JSON, body(lambda _: message() + b"// CANARY")),
    case("100,000 nested arrays", _TOO_DEEP, body(100_000 * b"[")),
    case("100,000 nested arrays in a message", _TOO_DEEP, body(_with(b'"a": ' + 100_000 * b"[" + 100_000 * b"]"))),
    case("5,000 levels", _TOO_DEEP, body(_with(b'"a": ' + 5_000 * b'{"a":' + b"1" + 5_000 * b"}"))),
    *(
        case(f"the number {name}", _NOT_JSON, body(_with(b'"a": ' + name.encode())))
        for name in ("NaN", "Infinity", "-Infinity", "+1", "01", ".5", "0x10", "1_000")
    ),
    case("NaN in Meta", _NOT_JSON, body(_meta(b'"FacilityCode": NaN'))),
    case("two Metas", quarantined("top_duplicate_key"), body(_twice("Meta"))),
    case("a key twice in Meta", quarantined("meta_duplicate_key"), body(_twice("EventType"))),
    case("a key twice deeper down", ACCEPTED, body(_with(b'"a": {"b": 1, "b": 2}'))),
    case("bad UTF-8", _NOT_UTF8, body(_with(b'"a": "\xff\xfe"'))),
    case("overlong UTF-8", _NOT_UTF8, body(_with(b'"a": "\xc0\xaf"'))),
    case("a surrogate in UTF-8", _NOT_UTF8, body(_with(b'"a": "\xed\xa0\x80"'))),
    case("UTF-16", _NOT_UTF8, body(lambda _: message().decode().encode("utf-16"))),
    case("UTF-16 without a mark", _NOT_JSON, body(lambda _: message().decode().encode("utf-16-le"))),
    case("a byte order mark", _NOT_JSON, body(lambda _: b"\xef\xbb\xbf" + message())),
    case("a lone surrogate", _NOT_JSON, body(_with(b'"a": "\\ud800"'))),
    case("a number of 30 digits", ACCEPTED, body(_with(b'"a": ' + 30 * b"9"))),
    case("a number of 5,000 digits", ACCEPTED, body(_with(b'"a": ' + 5_000 * b"9"))),
    case("1e400", ACCEPTED, body(_with(b'"a": 1e400'))),
    case("a NUL in a value", ACCEPTED, body(_with(b'"a": "b\\u0000c"'))),
    case("a NUL in a key", ACCEPTED, body(_with(b'"a\\u0000": 1'))),
    case("a NUL as it is", _NOT_JSON, body(_with(b'"a": "b\x00c"'))),
    case("a NUL in ids", ACCEPTED, body(_message(FacilityCode="a\x00b", Logs=[{"ID": "CANARY\x00x"}])), facility="ab"),
    *(
        case(f"top level {text.decode()}", quarantined("top_not_object"), body(text))
        for text in (b"[1]", b'"CANARY"', b"null", b"7")
    ),
    case("no Meta", quarantined("no_meta"), body(b'{"Patient": {"Name": "CANARY"}}')),
    case("Meta a list", quarantined("meta_not_object"), body(b'{"Meta": ["CANARY"]}')),
    case("Meta null", quarantined("meta_not_object"), body(b'{"Meta": null}')),
    case("DataModel a number", quarantined("kind_malformed"), body(_message(DataModel=7))),
    case("DataModel of 10 KB", quarantined("kind_malformed"), body(_message(DataModel="CANARY" + 10_000 * "x"))),
    case("DataModel with a newline", quarantined("kind_malformed"), body(_message(DataModel="CANARY\nx"))),
    case(
        "an unknown DataModel",
        ACCEPTED,
        body(_message(DataModel="Brand New", EventType="Thing")),
        kind="BrandNew.Thing",
    ),
    case("40 MB of one string", ACCEPTED, body(_large), size=40 * MIB),
    case("a million keys", ACCEPTED, body(_with(b", ".join(b'"a%d": 1' % n for n in range(1_000_000))))),
    *(
        case(
            f"an injection {number}",
            ACCEPTED,
            body(
                _message(FacilityCode=text, Logs=[{"ID": text, "AttemptID": text}], Source={"ID": SOURCE, "Name": text})
            ),
        )
        for number, text in enumerate(_INJECTIONS)
    ),
    *(case(f"the time {time}", ACCEPTED, body(_message(EventDateTime=time)), event_time=None) for time in _TIMES),
    case("addresses to be fetched", ACCEPTED, body(_metadata)),
)
