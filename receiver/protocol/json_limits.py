"""Checks of JSON text before it is parsed: its encoding and its depth, in bounded memory.

msgspec accepts bad UTF-8 in what it skips, and nests as deep as the interpreter's recursion limit allows.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from receiver.errors import Unreadable

# Redox's models nest about ten levels, FHIR about twenty. Python's json stops at about 1,000, depending on the version
# and on the caller's depth. A limit well below that is the same for every Python and thread: a handler can parse what
# is accepted here.
MAX_DEPTH: Final = 200

# Bytes that are checked at a time: a body of 40 MB, decoded at once, may take 160 MB.
_PIECE: Final = 1 << 16

_TO_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'{}[]"'))
_BRACKETS_IN_STRING: Final = re.compile(rb'"[^"]*"')
_STEP: Final = [(byte == ord("[")) - (byte == ord("]")) for byte in range(256)]


def check_encoding(body: bytes) -> None:
    """Raise `Unreadable("not_utf8")` if `body` is not UTF-8 (RFC 8259 8.1)."""
    if body.isascii():
        return
    decode = getincrementaldecoder("utf-8")().decode
    try:
        for at in range(0, len(body), _PIECE):
            decode(body[at : at + _PIECE], final=at + _PIECE >= len(body))
    except UnicodeDecodeError as exc:
        raise Unreadable("not_utf8") from exc


def check_depth(body: bytes) -> None:
    """Raise `Unreadable("too_deep")` if `body` has more than MAX_DEPTH levels. No recursion, bounded memory.

    `body` may be any bytes. If it is not JSON, a parser that stops at the first error does not go deeper than this
    limit.
    """
    # With at most that many brackets it cannot be too deep. Two passes of memchr; most real messages end here.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    if b"\\" in body:  # remove escapes, pairs before quotes: every remaining quote begins or ends a string
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Remove everything but brackets and quotes. A string without a bracket is now two adjacent quotes. Removing them
    # leaves every bracket inside or outside of a string, as before.
    structure = body.translate(_TO_SQUARE, _NOT_STRUCTURE).replace(b'""', b"")
    depth = 0
    for piece in _outside_strings(structure):
        if max(accumulate(map(_STEP.__getitem__, piece), initial=depth)) > MAX_DEPTH:
            raise Unreadable("too_deep")
        depth += piece.count(b"[") - piece.count(b"]")


def _outside_strings(structure: bytes) -> Iterator[bytes]:
    """Yield the brackets outside of strings, in pieces, because each match takes memory until the piece is done.

    Other threads can run between two pieces.
    """
    end = 0
    while end < len(structure):
        start, end = end, end + _PIECE
        if structure.count(b'"', start, end) % 2:  # it would end within a string
            end = structure.find(b'"', end) + 1 or len(structure)
        yield _BRACKETS_IN_STRING.sub(b"", structure[start:end])
