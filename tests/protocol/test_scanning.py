"""Scanning of JSON text: members and elements."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import Unreadable
from receiver.protocol import scanning
from receiver.protocol.json_limits import check_depth, check_encoding
from receiver.protocol.scanning import first_element, members, objects
from tests.protocol.json_texts import COMPACT, OBJECT, VALUE, Pairs, arrays, read_json


@st.composite
def _damaged(draw: st.DrawFn) -> str:
    """Return a JSON text with one character removed, replaced or added."""
    text = draw(OBJECT | VALUE)
    at = draw(st.integers(0, len(text)))
    piece = draw(st.sampled_from(["", '"', "\\", "{", "}", "[", "]", ",", ":", "0", "1", "x", "\x00", " ", "NaN", "."]))
    return text[:at] + piece + text[at + draw(st.integers(0, 1)) :]


@contextmanager
def _in_pieces(size: int | None) -> Iterator[None]:
    """Scan every object as one with too many members, and every array as a long one, with pieces of `size` bytes; None:
    scan them as small ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(scanning, "_PIECE", size)
            patch.setattr(scanning, "_MANY", 0)
        yield


# Sizes of a piece, in bytes.
_SIZE = st.none() | st.integers(1, 40)


class TestMembers:
    """`members` compared with Python's json."""

    @given(OBJECT | COMPACT, _SIZE)
    @settings(max_examples=300)
    def test_finds_what_json_finds(self, text: str, size: int | None) -> None:
        """It finds the same values as json, with their exact bytes, or both find a duplicate name."""
        pairs = read_json(text)
        names = [name for name, _ in pairs]
        wanted = {*names, "never"}
        body = text.encode()
        if len(names) > len(set(names)):
            with pytest.raises(Unreadable) as refused, _in_pieces(size):
                members(body, where="top", wanted=wanted)
            assert refused.value.reason == "top_duplicate_key"
        else:
            with _in_pieces(size):
                found = members(body, where="top", wanted=wanted)
            assert {name: read_json(body[start:end].decode()) for name, (start, end) in found.items()} == dict(pairs)
            assert all(body[start:end] == body[start:end].strip() for start, end in found.values())

    @given(_damaged(), _SIZE)
    @settings(max_examples=800)
    def test_accepts_the_same_texts_as_json(self, text: str, size: int | None) -> None:
        """A text with one changed character is JSON, and an object, exactly if it is for json.

        One difference is allowed: of what is neither an object nor JSON, either may be said.
        """
        try:
            value = read_json(text)
            expected = {None} if isinstance(value, Pairs) else {"top_not_object"}
            if isinstance(value, Pairs) and len(dict(value)) < len(value):
                expected = {"top_duplicate_key"}
        except ValueError:
            expected = {"not_json"} if text.lstrip(" \t\n\r").startswith("{") else {"not_json", "top_not_object"}
        try:
            with _in_pieces(size):
                members(text.encode(), where="top", wanted=())
            reason = None
        except Unreadable as exc:
            reason = exc.reason
        assert reason in expected

    @pytest.mark.parametrize(
        "text",
        [
            rb'{"a":"\ud800"}',
            rb'{"a":["\udfff"]}',
            rb'{"\ud800":1}',
            rb'{"a":"\ud83d\u0041"}',
            b"\xef\xbb\xbf{}",
            b'{"a":NaN}',
            b'{"a":[Infinity]}',
            b'{"a":-Infinity}',
        ],
    )
    def test_refuses_texts_that_only_python_accepts(self, text: bytes) -> None:
        """Python's json accepts more than RFC 8259: lone surrogates, byte order mark, NaN, Infinity."""
        json.loads(text)
        with pytest.raises(Unreadable) as refused:
            members(text, where="top", wanted=())
        assert refused.value.reason == "not_json"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"", "not_json"),
            (b"  ", "not_json"),
            (b"<html>", "not_json"),
            (b'{"a":1', "not_json"),
            (b'{"a":1} {}', "not_json"),
            (b'{"a":1,}', "not_json"),
            (b'{"a":01}', "not_json"),
            (b"{'a':1}", "not_json"),
            (b'{"a":"\n"}', "not_json"),
            (b'{"a":"\\x"}', "not_json"),
            (b"{\xc2\xa0}", "not_json"),
            (b"[]", "at_not_object"),
            (b'"{}"', "at_not_object"),
            (b"null", "at_not_object"),
            (b"1", "at_not_object"),
            (b'{"a":1,"a":1}', "at_duplicate_key"),
            (b'{"a":12,"a":1}', "at_duplicate_key"),
            (b'{"a":1,"a":12}', "at_duplicate_key"),
            (b'{"a":1 ,"b":2,"\\u0061":1}', "at_duplicate_key"),
            (b'{"b":{},"a":[1],"a":[2]}', "at_duplicate_key"),
            (b'{"a":"x","a":"xy"}', "at_duplicate_key"),
            (b'{"a":1.5,"b":0,"a":1}', "at_duplicate_key"),
            (b'{"a":null,"a":null}', "at_duplicate_key"),
        ],
    )
    def test_reasons(self, text: bytes, reason: str) -> None:
        """Each text that is not one object with distinct names has its reason."""
        with pytest.raises(Unreadable) as refused:
            members(text, where="at", wanted={"a"})
        assert refused.value.reason == reason

    def test_returns_only_what_is_wanted(self) -> None:
        """Other members are scanned, and not returned."""
        assert members(b' { "a" : [ 1 ] , "b" : {"a":2}\n}', where="top", wanted={"b", "c"}) == {"b": (23, 30)}

    def test_memory_does_not_grow_with_the_values(self) -> None:
        """A million members below the outermost object, or a string of 15 MB, take a few times the body's size."""
        for body in (
            b'{"x":[' + b",".join(b'{"k%d":%d}' % (n, n % 10) for n in range(1_000_000)) + b"]}",
            b'{"x":"' + b"A" * 20_000_000 + b'"}',
            b'{"' + b"A\\n" * 5_000_000 + b'":1}',
        ):
            assert _peak(body) < 4 * len(body)

    def test_memory_of_the_members_themselves(self) -> None:
        """Each member of the outermost object takes less than 200 bytes."""
        assert _peak(b"{" + b",".join(b'"k%d":%d' % (n, n % 10) for n in range(200_000)) + b"}") < 200 * 200_000

    def test_memory_of_very_many_members(self) -> None:
        """Beyond a limit they are not in memory at once, and take less than the body."""
        body = b"{" + b",".join(b'"k%d":%d' % (n, n % 10) for n in range(300_000)) + b',"x":[7]}'
        assert _peak(body) < 3 * len(body)
        start, end = members(body, where="top", wanted={"x"})["x"]
        assert body[start:end] == b"[7]"
        with pytest.raises(Unreadable) as refused:
            members(body[:-1] + b',"k\\u0037":0}', where="top", wanted={"x"})
        assert refused.value.reason == "top_duplicate_key"


class TestElements:
    """The elements of an array, compared with Python's json."""

    @given(arrays(VALUE) | OBJECT | VALUE, _SIZE)
    @settings(max_examples=500)
    def test_finds_what_json_finds(self, text: str, size: int | None) -> None:
        """The objects of any array, with any depth, in their order; none for any other value."""
        text = text.strip()
        value = read_json(text)
        with _in_pieces(size):
            found = list(objects(memoryview(text.encode()), holding=b""))
        expected = [] if isinstance(value, Pairs) or not isinstance(value, list) else value
        assert [read_json(bytes(each).decode()) for each in found] == [
            each for each in expected if isinstance(each, Pairs)
        ]

    def test_deep_elements(self) -> None:
        """The end of an element is found for any depth and any length of a string."""
        deep = b'{"a":' * 150 + b"[{}]" + b"}" * 150
        elements = [deep, b'{"]":"' + b'\\"[' * 50_000 + b'"}', b"{}", deep]
        text = b"[0, " + b" , ".join(elements) + b',"' + b"x" * 70_000 + b'"]'
        assert [bytes(each) for each in objects(memoryview(text), holding=b"{")] == elements

    def test_skips_elements(self) -> None:
        """In a long array, only runs of elements with the given bytes or an escape are decoded."""
        many = b",".join([b'{"a":1}'] * 10_000)
        for one in (b'{"wanted":1}', b'{"w\\u0061nted":1}'):
            found = [bytes(each) for each in objects(memoryview(b"[%b,%b,%b]" % (many, one, many)), holding=b"wanted")]
            assert one in found
            assert len(found) < 10_000

    @given(arrays(VALUE) | VALUE)
    def test_the_first(self, text: str) -> None:
        """The first element of any type; None for an empty array and for any other value."""
        text = text.strip()
        value = read_json(text)
        first = first_element(memoryview(text.encode()))
        expected = value[0] if isinstance(value, list) and not isinstance(value, Pairs) and value else None
        assert (None if first is None else read_json(bytes(first).decode())) == expected


def _peak(body: bytes) -> int:
    tracemalloc.start()
    try:
        check_encoding(body)
        check_depth(body)
        members(body, where="top", wanted={"x"})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
