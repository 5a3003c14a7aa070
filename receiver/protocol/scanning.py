"""Scanner of JSON text: finds members and elements without building them.

Memory is bounded by a few times the text, whatever it holds. Must not decode large values. It adds what msgspec does
not have: msgspec accepts duplicate keys silently (the last one wins), and builds a list only as a whole.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator, Mapping
from functools import cache, reduce
from typing import Any, Final

import msgspec

from receiver.errors import Unreadable

# Bytes that are scanned at a time, and of the longest value that is decoded.
_PIECE: Final = 1 << 16

# The name of a member, from the brace or comma before it to the start of its value. Possessive: otherwise the matcher
# stores a position to backtrack to for every character, which takes gigabytes for a long name.
_KEY: Final = re.compile(rb'[ \t\n\r]*[{,][ \t\n\r]*("(?:[^"\\]++|\\.)*+")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_END: Final = re.compile(rb"[ \t\n\r]*\{?[ \t\n\r]*\}")
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_any: Final = msgspec.json.Decoder().decode
_decode_raw: Final = msgspec.json.Decoder(msgspec.Raw).decode
_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode

# More members than any real object has at its outermost level. With more, they are not decoded all at once.
_MANY: Final = 20_000

# The following patterns are only for valid JSON text. A value with at most this many levels is matched as a whole; FHIR
# has about twenty.
_LEVELS: Final = 24
_SPACE: Final = rb"[ \t\n\r]*+"
_TEXT: Final = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT: Final = rb'[^\]\[{}"]++|' + _TEXT
_SIMPLE: Final = rb"(?:" + _TEXT + rb'|[^\]\[{}", \t\n\r]++)'
_NESTED: Final = reduce(
    lambda inner, _: rb"[\[{](?:" + _FLAT + rb"|" + inner + rb")*+[\]}]",
    range(_LEVELS),
    rb"[\[{](?:" + _FLAT + rb")*+[\]}]",
)
_NAMED: Final = _TEXT + _SPACE + rb":" + _SPACE
_VALUE: Final = rb"(?:" + _SIMPLE + rb"|" + _NESTED + rb")"
_OPEN: Final = re.compile(_SPACE + rb"[\[{]" + _SPACE)
_CLOSE: Final = re.compile(rb"[\]}]")
_NEXT: Final = re.compile(_SPACE + rb",?" + _SPACE)
_NAME: Final = re.compile(rb"(?:" + _NAMED + rb")?", re.DOTALL)
_SCALAR: Final = re.compile(_SIMPLE, re.DOTALL)
_BRACKET: Final = re.compile(rb"(?:" + _FLAT + rb")*+(?:([\[{])|[\]}])", re.DOTALL)


def members(text: bytes, *, where: str, wanted: Collection[str]) -> dict[str, tuple[int, int]]:
    """Return the wanted members of the JSON object `text`: name → (start, end) of the value in `text`.

    Checks that `text` is one JSON document (RFC 8259; NaN, lone surrogates and a byte order mark are refused too) whose
    outermost object has no member twice, in any escaped form. `text` must have passed `check_encoding` and
    `check_depth`. Memory: about 150 bytes for each member of the outermost object, but at most twice the text from
    _MANY members on. Raises `Unreadable`: `not_json`, `<where>_not_object`, `<where>_duplicate_key`.
    """
    try:
        values = _decode_members(text) if len(text) <= _PIECE else _decode_few_members(text)
    except _Many:
        return _many_members(text, where=where, wanted=wanted)
    except msgspec.ValidationError as exc:
        raise Unreadable(f"{where}_not_object") from exc
    except msgspec.DecodeError as exc:
        raise Unreadable("not_json") from exc
    return _located(text, values, where=where, wanted=wanted)


def _located(
    text: bytes, values: dict[str, msgspec.Raw], *, where: str, wanted: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Return the positions of the wanted members in `text`. `values`: the members that msgspec found; it is emptied."""
    if (found := _close_together(values, len(text), wanted)) is not None:
        return found
    found = {}
    # From name to name: msgspec keeps the last value of each, and its length gives the position of the next name. If a
    # name comes twice, either other bytes are at its first position, or they are the beginning of a longer value (1 and
    # 12), or the name comes again after its value was removed.
    end = 0
    while (key := _KEY.match(text, end)) is not None:
        name, start = _decode_text(key[1]), key.end()
        value = values.pop(name, None)
        if value is None or not text.startswith(value, start):
            raise Unreadable(f"{where}_duplicate_key")
        end = start + len(memoryview(value))
        if name in wanted:
            found[name] = start, end
    if _END.match(text, end) is None:
        raise Unreadable(f"{where}_duplicate_key")
    return found


def _close_together(
    values: Mapping[str, msgspec.Raw], length: int, wanted: Collection[str]
) -> dict[str, tuple[int, int]] | None:
    """Return the result of `members` for an object of `length` bytes without white space around and escapes in its
    names, the form that programs write; None for any other.

    The sum of the lengths shows it: white space, an escape or a duplicate name would leave bytes over.
    """
    found: dict[str, tuple[int, int]] = {}
    end = 0
    for name, value in values.items():
        # A brace or a comma, two quotes, a colon.
        start = end + 4 + (len(name) if name.isascii() else len(name.encode()))
        end = start + len(memoryview(value))
        if name in wanted:
            found[name] = start, end
    return found if end + 1 == length else None


class _Many(Exception):
    """The object has more than _MANY members."""


class _Name(str):
    """A member's name: with this type, msgspec calls the hook that counts members."""

    __slots__ = ()


def _decode_few_members(text: bytes) -> dict[str, msgspec.Raw]:
    """Return the members of an object. Raises _Many."""
    count = 0

    def name(_type: type, text: str) -> _Name:
        nonlocal count
        count += 1
        if count > _MANY:
            raise _Many
        return _Name(text)

    found: dict[Any, msgspec.Raw] = msgspec.json.Decoder(dict[_Name, msgspec.Raw], dec_hook=name).decode(text)
    return found


def _many_members(text: bytes, *, where: str, wanted: Collection[str]) -> dict[str, tuple[int, int]]:
    """Return the result of `members`, decoding some of the members at a time. Of the names, only hashes are kept.

    Two different names may have the same hash of 64 bits: with ten million names, once in 300,000 bodies. The hash has
    another key in every process, so a sender cannot cause it.
    """
    try:
        _decode_raw(text)
    except msgspec.DecodeError as exc:
        raise Unreadable("not_json") from exc
    found: dict[str, tuple[int, int]] = {}
    hashes = [array("q") for _ in range(256)]  # in groups, so that a set of only one group exists at a time
    for start, end in _runs(memoryview(text), _NAMED + _VALUE):
        piece = b"{%b}" % text[start:end]
        values = _decode_members(piece)
        for name in values:
            hashes[hash(name) & 255].append(hash(name))
        found |= {
            name: (start - 1 + first, start - 1 + last)
            for name, (first, last) in _located(piece, values, where=where, wanted=wanted).items()
        }
    if any(len(set(some)) < len(some) for some in hashes):
        raise Unreadable(f"{where}_duplicate_key")
    return found


def objects(text: msgspec.Raw | memoryview, *, holding: bytes) -> Iterator[msgspec.Raw | memoryview]:
    """Yield the objects in a JSON array; none for any other value.

    `text` must be a part of a text that `members` accepted. In a long array, objects are skipped that contain neither
    the bytes `holding` nor an escape sequence that could encode them. Memory: a few megabytes for any number of
    objects.
    """
    view = memoryview(text)
    if _first_byte(view) != b"[":
        return
    if len(view) <= _PIECE:
        yield from filter(is_object, _decode_raws(view))
        return
    for start, end in _runs(view, _VALUE):
        if end - start > _PIECE:
            yield from filter(is_object, [view[start:end]])
            continue
        piece = b"[%b]" % bytes(view[start:end])
        if holding in piece or b"\\u" in piece:
            yield from filter(is_object, _decode_raws(piece))


class _Array(msgspec.Struct, array_like=True):
    """An array of which only the first element is decoded."""

    first: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_array: Final = msgspec.json.Decoder(_Array).decode


def first_element(text: msgspec.Raw | memoryview) -> msgspec.Raw | None:
    """Return the first element of a JSON array; None for an empty array, or any other value."""
    if _first_byte(memoryview(text)) != b"[":
        return None
    first = _decode_array(text).first
    return None if isinstance(first, msgspec.UnsetType) else first


def value(text: msgspec.Raw | memoryview, *, longest: int = _PIECE) -> Any:
    """Return the decoded value; None if its text is longer than `longest` bytes, or Python cannot represent it (1e400,
    an integer of 5,000 digits).
    """
    if len(memoryview(text)) > longest:
        return None
    try:
        return _decode_any(text)
    except msgspec.ValidationError:
        return None


def is_object(text: msgspec.Raw | memoryview) -> bool:
    """Return whether a JSON value is an object. `text` must not begin with white space."""
    return _first_byte(memoryview(text)) == b"{"


def _first_byte(text: memoryview) -> bytes:
    return bytes(text[:1])


@cache
def _whole(item: bytes) -> re.Pattern[bytes]:
    """Return the pattern of complete items, each followed by a comma or the end. Compiling takes some milliseconds."""
    whole = item + _SPACE + rb"(?=[,\]}])"
    return re.compile(whole + rb"(?:," + _SPACE + whole + rb")*+", re.DOTALL)


def _runs(text: memoryview, item: bytes) -> Iterator[tuple[int, int]]:
    """Yield the spans of the members or elements of an object or array: as many as fit into _PIECE, or one.

    Other threads can run between two spans.
    """
    run = _whole(item)
    at = _after(_OPEN, text, 0)
    while (found := run.match(text, at, at + _PIECE)) is not None or _CLOSE.match(text, at) is None:
        end = _end_of_item(text, at) if found is None else found.end()
        yield at, end
        at = _after(_NEXT, text, end)


def _end_of_item(text: memoryview, at: int) -> int:
    """Return the end of the member or element at `at`, which is long or has many levels."""
    at = _after(_NAME, text, at)
    if (scalar := _SCALAR.match(text, at)) is not None:
        return scalar.end()
    depth, brackets = 0, _BRACKET.finditer(text, at)
    while True:  # to the closing bracket: the text is valid JSON
        bracket = next(brackets)
        depth += 1 if bracket.lastindex else -1
        if depth == 0:
            return bracket.end()


def _after(pattern: re.Pattern[bytes], text: memoryview, at: int) -> int:
    """Return the end of the match of a pattern that always matches."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()
