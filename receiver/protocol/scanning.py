"""Looks at JSON text without building it: depth, and the members of one object with their exact bytes.

May not decode values: msgspec does that. Here stands only what msgspec leaves open: it takes duplicate keys silently (the
last wins), and how deep it goes differs between Python versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Final

import msgspec

from receiver.errors import Unreadable

# Redox's models nest about ten levels, FHIR about twenty. Python's json gives up at 1,000 or so, depending on the version:
# a limit of ours below that makes every Python agree, so that what is accepted here can be parsed in a handler.
MAX_DEPTH: Final = 200

# Above this many colons the members of an object are found by a slower scan that holds no value objects: 20,000 raw
# values take about 4 MB, a 40 MB body of tiny members would take 1 GB.
MANY_COLONS: Final = 20_000

_SPACE: Final = re.compile(rb"[ \t\n\r]*")
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'{}[]"\\'))
_STEP: Final = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_OPEN, _CLOSE, _QUOTE, _COLON, _COMMA = b'{}":,'
_validate: Final = msgspec.json.Decoder(msgspec.Raw)
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_decode_text: Final = msgspec.json.Decoder(str)


def check_depth(body: bytes) -> None:
    """Raise `Unreadable("too_deep")` when `body` (any bytes) nests deeper than MAX_DEPTH."""
    # No more brackets than the limit: cannot be too deep. Two passes of memchr; nearly every real message ends here.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    # Otherwise only structure, quotes and backslashes are kept, then whole strings are dropped: what is left is brackets.
    structure = body.translate(None, _NOT_STRUCTURE)
    structure = re.sub(rb"\\.", b"", structure, flags=re.DOTALL)
    structure = re.sub(rb'"[^"]*"', b"", structure)
    if max(accumulate(_STEP[byte] for byte in structure), default=0) > MAX_DEPTH:
        raise Unreadable("too_deep")


def members(text: bytes, *, where: str) -> dict[str, tuple[int, int]]:
    """The members of the JSON object `text`: name → (start, end) of its value in `text`.

    Proves on the way that `text` is one JSON document (RFC 8259; NaN and lone surrogates are refused). Its encoding is
    not looked at. Raises `Unreadable`: `not_json`, `<where>_not_object` or `<where>_duplicate_key`.
    """
    try:
        if text.count(b":") > MANY_COLONS:
            _validate.decode(text)
            found = _members_by_scan(text)
        else:
            found = _members_by_value(text, _decode_members.decode(text))
    except msgspec.ValidationError as exc:
        raise Unreadable(f"{where}_not_object") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Unreadable("not_json") from exc
    if found is None:
        raise Unreadable(f"{where}_duplicate_key")
    return found


def _members_by_value(text: bytes, values: Mapping[str, msgspec.Raw]) -> dict[str, tuple[int, int]] | None:
    """Walk from key to key: msgspec kept the last value of each name, so its bytes tell where the walk goes on.

    When a name stands twice, either the bytes differ at its first place, or it is met a second time: None.
    """
    found: dict[str, tuple[int, int]] = {}
    at = _past_space(text, _past_space(text, 0) + 1)
    while text[at] != _CLOSE:
        name, start = _key(text, at)
        end = start + len(memoryview(values[name]))
        if name in found or not text.startswith(values[name], start):
            return None
        found[name] = (start, end)
        at = _past_space(text, end)
        if text[at] == _COMMA:
            at = _past_space(text, at + 1)
        elif text[at] != _CLOSE:  # the kept value is the beginning of a longer one: 1 and 12
            return None
    return found


def _members_by_scan(text: bytes) -> dict[str, tuple[int, int]] | None:
    """The same from tokens alone, for objects of very many members; `text` must be proved to be a JSON document."""
    if text[_past_space(text, 0)] != _OPEN:
        raise msgspec.ValidationError("not an object")
    found: dict[str, tuple[int, int]] = {}
    depth = 0
    name, start = None, 0
    for token in _TOKEN.finditer(text):
        byte = text[token.start()]
        if byte == _QUOTE:
            if depth != 1 or text[_past_space(text, token.end())] != _COLON:
                continue
            if name is not None:
                found[name] = (start, _before_space(text, _before_space(text, token.start()) - 1))
            name, start = _key(text, token.start())
            if name in found:
                return None
        elif byte in b"{[":
            depth += 1
        else:
            depth -= 1
            if depth == 0 and name is not None:
                found[name] = (start, _before_space(text, token.start()))
    return found


def _key(text: bytes, at: int) -> tuple[str, int]:
    """The member name that begins at `at`, and where its value begins."""
    match = _STRING.match(text, at)
    assert match is not None
    colon = _past_space(text, match.end())
    return _decode_text.decode(match.group()), _past_space(text, colon + 1)


def _past_space(text: bytes, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _before_space(text: bytes, end: int) -> int:
    while text[end - 1] in b" \t\n\r":
        end -= 1
    return end
