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

# The name of a member, from the brace or comma before it to where its value begins. Possessive: without that the
# matcher keeps a way back for every character, which for a long name is gigabytes.
_KEY: Final = re.compile(rb'[ \t\n\r]*[{,][ \t\n\r]*("(?:[^"\\]++|\\.)*+")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_END: Final = re.compile(rb"[ \t\n\r]*\{?[ \t\n\r]*\}")
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_any: Final = msgspec.json.Decoder().decode
_decode_raw: Final = msgspec.json.Decoder(msgspec.Raw).decode
_decode_raws: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode

# More members than any real object has at its outermost level: from here on they are not held all at once.
_MANY: Final = 20_000

# What follows matches proved JSON text alone. A value is matched whole where it nests no deeper than this; FHIR nests
# about twenty levels.
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
    """The wanted members of the JSON object `text`: name → (start, end) of the value in `text`.

    Proves on the way that `text` is one JSON document (RFC 8259; also refused are NaN, lone surrogates and a byte order
    mark) whose outermost object names no member twice, however the name is escaped. `text` must have passed
    `check_encoding` and `check_depth`. Memory: about 150 bytes for each member of the outermost object, but at most
    twice the text from _MANY members on, and none for what they hold. Raises `Unreadable`: `not_json`,
    `<where>_not_object`, `<where>_duplicate_key`.
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
    """Where the wanted members stand in `text`, of which `values` is what msgspec made. Empties `values`."""
    if (found := _close_together(values, len(text), wanted)) is not None:
        return found
    found = {}
    # From name to name: of each msgspec kept the last value, whose length tells where the next name is. When one
    # stands twice, either other bytes are at its first place, or those are the beginning of a longer value (1 and 12),
    # or it is met again after its value was taken.
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
    """What `members` finds in an object of `length` bytes without white space and escapes around its names, as machines
    write them; None of any other.

    The lengths tell: white space, an escape or a name that stands twice would leave bytes over.
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
    """A member's name, so that msgspec has each of them counted."""

    __slots__ = ()


def _decode_few_members(text: bytes) -> dict[str, msgspec.Raw]:
    """The members of an object. Raises _Many."""
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
    """What `members` finds in an object, some of its members at a time; of all names only the hashes are held.

    Two names that are not the same may have one hash of 64 bits: with ten million names, once in 300,000 bodies. The
    hash is keyed anew in every process, so nobody can bring it about.
    """
    try:
        _decode_raw(text)
    except msgspec.DecodeError as exc:
        raise Unreadable("not_json") from exc
    found: dict[str, tuple[int, int]] = {}
    hashes = [array("q") for _ in range(256)]  # apart, so that only some of them are a set at a time
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
    """The objects among the elements of a JSON array, one after another; of any other value none.

    `text` must be a part of what `members` has proved. Of a long array those are passed over that do not hold the bytes
    `holding`, nor an escape that could stand for them. Memory: a few megabytes, however many there are.
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
    """An array of which all but the first element is passed over."""

    first: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_array: Final = msgspec.json.Decoder(_Array).decode


def first_element(text: msgspec.Raw | memoryview) -> msgspec.Raw | None:
    """The first element of a JSON array; None of any other value, and when there is none."""
    if _first_byte(memoryview(text)) != b"[":
        return None
    first = _decode_array(text).first
    return None if isinstance(first, msgspec.UnsetType) else first


def value(text: msgspec.Raw | memoryview, *, longest: int = _PIECE) -> Any:
    """The decoded value; None where its text is longer than that many bytes, or Python cannot hold it (1e400, an
    integer of 5,000 digits)."""
    if len(memoryview(text)) > longest:
        return None
    try:
        return _decode_any(text)
    except msgspec.ValidationError:
        return None


def is_object(text: msgspec.Raw | memoryview) -> bool:
    """Whether a JSON value is an object. `text` has no space before it."""
    return _first_byte(memoryview(text)) == b"{"


def _first_byte(text: memoryview) -> bytes:
    return bytes(text[:1])


@cache
def _whole(item: bytes) -> re.Pattern[bytes]:
    """As many items as are whole: behind each there is a comma or the end. Compiling it takes some milliseconds."""
    whole = item + _SPACE + rb"(?=[,\]}])"
    return re.compile(whole + rb"(?:," + _SPACE + whole + rb")*+", re.DOTALL)


def _runs(text: memoryview, item: bytes) -> Iterator[tuple[int, int]]:
    """The spans of all members, or elements, of an object or array: as many together as are within _PIECE, or one.

    Between them other threads have their turn.
    """
    run = _whole(item)
    at = _after(_OPEN, text, 0)
    while (found := run.match(text, at, at + _PIECE)) is not None or _CLOSE.match(text, at) is None:
        end = _end_of_item(text, at) if found is None else found.end()
        yield at, end
        at = _after(_NEXT, text, end)


def _end_of_item(text: memoryview, at: int) -> int:
    """Where the member or element ends that begins at `at`: a long one, or one that nests deep."""
    at = _after(_NAME, text, at)
    if (scalar := _SCALAR.match(text, at)) is not None:
        return scalar.end()
    depth, brackets = 0, _BRACKET.finditer(text, at)
    while True:  # to the bracket that closes it: the text is proved to be JSON
        bracket = next(brackets)
        depth += 1 if bracket.lastindex else -1
        if depth == 0:
            return bracket.end()


def _after(pattern: re.Pattern[bytes], text: memoryview, at: int) -> int:
    """Where the match ends of a pattern that always matches."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()
