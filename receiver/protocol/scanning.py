"""Looks at JSON text without building it: its encoding, its depth, and where the members of one object stand.

May not decode values: msgspec does that. Here stands only what msgspec leaves open: it accepts bad UTF-8 in what it
skips, takes duplicate keys silently (the last wins), and goes as deep as the interpreter's recursion limit lets it.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from typing import Final

import msgspec

from receiver.errors import Unreadable

# Redox's models nest about ten levels, FHIR about twenty. Python's json gives up at 1,000 or so, depending on the
# version and on the caller's own depth: a limit of ours well below that makes every Python and every thread agree, so
# that what is accepted here can be parsed in a handler.
MAX_DEPTH: Final = 200

# Text is decoded only to prove its encoding, a piece at a time: a body of 40 MB as one str may take 160 MB. So is its
# structure looked at.
_PIECE: Final = 1 << 16

_TO_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'{}[]"'))
_BRACKETS_IN_STRING: Final = re.compile(rb'"[^"]*"')
_STEP: Final = [(byte == ord("[")) - (byte == ord("]")) for byte in range(256)]

# The name of a member, from the brace or comma before it to where its value begins. Possessive: without that the
# matcher keeps a way back for every character, which for a long name is gigabytes.
_KEY: Final = re.compile(rb'[ \t\n\r]*[{,][ \t\n\r]*("(?:[^"\\]++|\\.)*+")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_END: Final = re.compile(rb"[ \t\n\r]*\{?[ \t\n\r]*\}")
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text: Final = msgspec.json.Decoder(str).decode


def check_encoding(body: bytes) -> None:
    """Raise `Unreadable("not_utf8")` when `body` is not UTF-8 (RFC 8259 8.1)."""
    if body.isascii():
        return
    decode = getincrementaldecoder("utf-8")().decode
    try:
        for at in range(0, len(body), _PIECE):
            decode(body[at:at + _PIECE], final=at + _PIECE >= len(body))
    except UnicodeDecodeError as exc:
        raise Unreadable("not_utf8") from exc


def check_depth(body: bytes) -> None:
    """Raise `Unreadable("too_deep")` when `body` nests deeper than MAX_DEPTH. Any bytes; no recursion, bounded memory.

    What is no JSON has no depth: of such a body it is only sure that a parser which stops at the first error has not
    gone deeper.
    """
    # No more brackets than the limit: cannot be too deep. Two passes of memchr; most real messages end here.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    if b"\\" in body:  # escapes go first, pairs before quotes, so that every quote left opens or closes a string
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Then all but brackets and quotes. Strings that held no bracket are now two quotes side by side, and taking any
    # such two away leaves every bracket inside or outside of a string, as it was.
    structure = body.translate(_TO_SQUARE, _NOT_STRUCTURE).replace(b'""', b"")
    depth = 0
    for piece in _outside_strings(structure):
        if max(accumulate(map(_STEP.__getitem__, piece), initial=depth)) > MAX_DEPTH:
            raise Unreadable("too_deep")
        depth += piece.count(b"[") - piece.count(b"]")


def _outside_strings(structure: bytes) -> Iterator[bytes]:
    """Brackets and quotes without what stands between two quotes, in pieces: each match costs memory until it is done.

    Between pieces other threads have their turn.
    """
    end = 0
    while end < len(structure):
        start, end = end, end + _PIECE
        if structure.count(b'"', start, end) % 2:  # it would end within a string
            end = structure.find(b'"', end) + 1 or len(structure)
        yield _BRACKETS_IN_STRING.sub(b"", structure[start:end])


def members(text: bytes, *, where: str, wanted: Collection[str]) -> dict[str, tuple[int, int]]:
    """The wanted members of the JSON object `text`: name → (start, end) of the value in `text`.

    Proves on the way that `text` is one JSON document (RFC 8259; also refused are NaN, lone surrogates and a byte order
    mark) whose outermost object names no member twice, however the name is escaped. `text` must have passed
    `check_encoding` and `check_depth`. Memory: about 150 bytes for each member of the outermost object, none for what
    they hold. Raises `Unreadable`: `not_json`, `<where>_not_object`, `<where>_duplicate_key`.
    """
    try:
        values = _decode_members(text)
    except msgspec.ValidationError as exc:
        raise Unreadable(f"{where}_not_object") from exc
    except msgspec.DecodeError as exc:
        raise Unreadable("not_json") from exc
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


def _close_together(values: Mapping[str, msgspec.Raw], length: int,
                    wanted: Collection[str]) -> dict[str, tuple[int, int]] | None:
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
