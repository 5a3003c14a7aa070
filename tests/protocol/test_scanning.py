"""JSON text looked at from outside: encoding, depth, members."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, stack_size
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import Unreadable
from receiver.protocol import scanning
from receiver.protocol.json_limits import MAX_DEPTH, check_depth, check_encoding
from receiver.protocol.scanning import first_element, members, objects

# JSON texts written piece by piece, not by a serialiser: with space anywhere, names escaped in several ways, and names
# that come twice. Strings hold brackets, quotes and backslashes, which a scan must not take for structure.
_SPACE = st.sampled_from(["", " ", "\n\t", "\r\n "])
_NAME = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"Meta"', '"M\\u0065ta"', '""', '"\\""', '"{"', '"é"', '"\\\\"'])
_STRING = st.lists(
    st.sampled_from(["[", "]", "{", "}", ":", ",", '\\"', "\\\\", "\\n", "\\u005b", "x", "é"]), max_size=6
).map(lambda parts: f'"{"".join(parts)}"')
_NUMBER = st.sampled_from(["0", "-0", "1", "12", "123", "1.5", "1e5", "1E+400", "123456789012345678901234567890"])
_LITERAL = st.sampled_from(["true", "false", "null"])


def _array(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.builds("{}{}{}".format, _SPACE, values, _SPACE), max_size=4)
    return items.map(lambda parts: f"[{','.join(parts)}]")


def _object(values: st.SearchStrategy[str], names: st.SearchStrategy[str] = _NAME) -> st.SearchStrategy[str]:
    items = st.lists(st.builds("{}{}{}:{}{}{}".format, _SPACE, names, _SPACE, _SPACE, values, _SPACE), max_size=5)
    return st.builds("{{{}{}}}".format, _SPACE, items.map(",".join))


_VALUE = st.recursive(_STRING | _NUMBER | _LITERAL, lambda values: _array(values) | _object(values), max_leaves=12)
_OBJECT = st.builds("{}{}{}".format, _SPACE, _object(_VALUE), _SPACE)
# As machines write them: no space around the names.
_COMPACT = st.lists(st.builds("{}:{}".format, _NAME, _VALUE), max_size=5).map(lambda items: f"{{{','.join(items)}}}")


@st.composite
def _damaged(draw: st.DrawFn) -> str:
    """A JSON text in which one character was taken out or replaced, or into which one was put."""
    text = draw(_OBJECT | _VALUE)
    at = draw(st.integers(0, len(text)))
    piece = draw(st.sampled_from(["", '"', "\\", "{", "}", "[", "]", ",", ":", "0", "1", "x", "\x00", " ", "NaN", "."]))
    return text[:at] + piece + text[at + draw(st.integers(0, 1)) :]


class _Pairs(list[tuple[str, Any]]):
    """An object as json read it, with every member, also those that stand twice."""


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _read(text: str) -> Any:
    """The text as Python's json reads it. Numbers stay text: how large one may be is no matter of syntax."""
    return json.loads(text, object_pairs_hook=_Pairs, parse_constant=_constant, parse_int=str, parse_float=str)


def _depth(value: Any) -> int:
    if isinstance(value, _Pairs):
        return 1 + max((_depth(inner) for _, inner in value), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@contextmanager
def _in_pieces(size: int | None) -> Iterator[None]:
    """Have every object looked at as one of too many members is, and every array as a long one, so many bytes at once;
    None: as small ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(scanning, "_PIECE", size)
            patch.setattr(scanning, "_MANY", 0)
        yield


# Bytes of a piece.
_SIZE = st.none() | st.integers(1, 40)


class TestMembers:
    """`members` against Python's json as the oracle."""

    @given(_OBJECT | _COMPACT, _SIZE)
    @settings(max_examples=300)
    def test_finds_what_json_finds(self, text: str, size: int | None) -> None:
        """Of any object it finds the values that json finds, at their exact bytes, or both find a name twice."""
        pairs = _read(text)
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
            assert {name: _read(body[start:end].decode()) for name, (start, end) in found.items()} == dict(pairs)
            assert all(body[start:end] == body[start:end].strip() for start, end in found.values())

    @given(_damaged(), _SIZE)
    @settings(max_examples=800)
    def test_takes_what_json_takes(self, text: str, size: int | None) -> None:
        """Whatever one wrong character does to a text: it is JSON here when it is JSON to json, and an object too.

        One difference is allowed: of what is neither an object nor JSON, either may be said.
        """
        try:
            value = _read(text)
            expected = {None} if isinstance(value, _Pairs) else {"top_not_object"}
            if isinstance(value, _Pairs) and len(dict(value)) < len(value):
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
    def test_refuses_what_json_takes(self, text: bytes) -> None:
        """Where RFC 8259 leaves no room or Python's json is lax: lone surrogates, byte order mark, NaN, Infinity."""
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
    def test_says_what_is_wrong(self, text: bytes, reason: str) -> None:
        """Each way not to be one object of distinct names has its word."""
        with pytest.raises(Unreadable) as refused:
            members(text, where="at", wanted={"a"})
        assert refused.value.reason == reason

    def test_returns_only_what_is_wanted(self) -> None:
        """What nobody asked for is looked at, and left."""
        assert members(b' { "a" : [ 1 ] , "b" : {"a":2}\n}', where="top", wanted={"b", "c"}) == {"b": (23, 30)}

    def test_memory_does_not_grow_with_what_members_hold(self) -> None:
        """A million members below the outermost object, or one string or name of 15 MB, take a few bodies' memory."""
        for body in (
            b'{"x":[' + b",".join(b'{"k%d":%d}' % (n, n % 10) for n in range(1_000_000)) + b"]}",
            b'{"x":"' + b"A" * 20_000_000 + b'"}',
            b'{"' + b"A\\n" * 5_000_000 + b'":1}',
        ):
            assert _peak(body) < 4 * len(body)

    def test_memory_of_the_members_themselves(self) -> None:
        """Each member of the outermost object takes under 200 bytes: a million of them can be taken."""
        assert _peak(b"{" + b",".join(b'"k%d":%d' % (n, n % 10) for n in range(200_000)) + b"}") < 200 * 200_000

    def test_memory_of_very_many_members(self) -> None:
        """Beyond some thousands they are not held at once: all of them take less than the body does."""
        body = b"{" + b",".join(b'"k%d":%d' % (n, n % 10) for n in range(300_000)) + b',"x":[7]}'
        assert _peak(body) < 3 * len(body)
        start, end = members(body, where="top", wanted={"x"})["x"]
        assert body[start:end] == b"[7]"
        with pytest.raises(Unreadable) as refused:
            members(body[:-1] + b',"k\\u0037":0}', where="top", wanted={"x"})
        assert refused.value.reason == "top_duplicate_key"


class TestElements:
    """The elements of an array, one after another, against Python's json."""

    @given(_array(_VALUE) | _OBJECT | _VALUE, _SIZE)
    @settings(max_examples=500)
    def test_finds_what_json_finds(self, text: str, size: int | None) -> None:
        """The objects of any array, in their order, and none of any other value; also where they nest deep."""
        text = text.strip()
        value = _read(text)
        with _in_pieces(size):
            found = list(objects(memoryview(text.encode()), holding=b""))
        expected = [] if isinstance(value, _Pairs) or not isinstance(value, list) else value
        assert [_read(bytes(each).decode()) for each in found] == [
            each for each in expected if isinstance(each, _Pairs)
        ]

    def test_deep_ones(self) -> None:
        """Whatever the depth, and however long a string is, an element ends where it ends."""
        deep = b'{"a":' * 150 + b"[{}]" + b"}" * 150
        elements = [deep, b'{"]":"' + b'\\"[' * 50_000 + b'"}', b"{}", deep]
        text = b"[0, " + b" , ".join(elements) + b',"' + b"x" * 70_000 + b'"]'
        assert [bytes(each) for each in objects(memoryview(text), holding=b"{")] == elements

    def test_passes_over_what_holds_nothing(self) -> None:
        """In a long array only runs of elements are decoded that hold the bytes asked for, or an escape."""
        many = b",".join([b'{"a":1}'] * 10_000)
        for one in (b'{"wanted":1}', b'{"w\\u0061nted":1}'):
            found = [bytes(each) for each in objects(memoryview(b"[%b,%b,%b]" % (many, one, many)), holding=b"wanted")]
            assert one in found
            assert len(found) < 10_000

    @given(_array(_VALUE) | _VALUE)
    def test_the_first(self, text: str) -> None:
        """The first element, whatever it is; None of an empty array and of any other value."""
        text = text.strip()
        value = _read(text)
        first = first_element(memoryview(text.encode()))
        expected = value[0] if isinstance(value, list) and not isinstance(value, _Pairs) and value else None
        assert (None if first is None else _read(bytes(first).decode())) == expected


class TestDepth:
    """`check_depth` against the depth of what json builds."""

    @given(_VALUE | _OBJECT, st.integers(0, 4), st.integers(1, 12))
    @settings(max_examples=500)
    def test_is_the_depth_of_the_value(self, text: str, limit: int, piece: int) -> None:
        """It refuses exactly the texts whose value is nested deeper than the limit, whatever their strings hold.

        And however small the pieces are that it looks at.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scanning, "MAX_DEPTH", limit)
            patch.setattr(scanning, "_PIECE", piece)
            assert _too_deep(text.encode()) == (_depth(_read(text)) > limit)

    @pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a\\n":', b"}]")])
    def test_the_limit_itself_is_allowed(self, opening: bytes, closing: bytes) -> None:
        """MAX_DEPTH levels pass, one more does not; what stands beside them makes no difference."""
        levels = MAX_DEPTH // (opening.count(b"[") + opening.count(b"{"))
        beside = b'["\\n","[[\\"","\\\\",' + b"[]," * MAX_DEPTH
        assert not _too_deep(opening * levels + b"0" + closing * levels)
        assert not _too_deep(beside + opening * (levels - 1) + b"0" + closing * (levels - 1) + b"]")
        assert _too_deep(beside + opening * levels + b"0" + closing * levels + b"]")

    @pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 5_000, b"]" * 500 + b"[" * 10_000, b'"' + b"[" * 300])
    def test_what_is_no_json_is_no_danger(self, text: bytes) -> None:
        """Brackets that never close are counted as they come, and neither recurse nor crash."""
        assert _too_deep(text) or text.startswith(b"]")

    def test_needs_no_stack(self) -> None:
        """In a thread with a stack of 256 KB, 100,000 levels are refused and the deepest that are allowed are read."""
        results: list[object] = []

        def work() -> None:
            results.append(_too_deep(b"[" * 100_000 + b"]" * 100_000))
            text = b'{"a":' * MAX_DEPTH + b"0" + b"}" * MAX_DEPTH
            check_depth(text)
            results.append(members(text, where="top", wanted={"a"}))

        before = stack_size(256 * 1024)
        try:
            thread = Thread(target=work)
            thread.start()
        finally:
            stack_size(before)
        thread.join()
        assert results == [True, {"a": (5, 6 * MAX_DEPTH)}]

    def test_memory_is_bounded_by_the_body(self) -> None:
        """The worst bodies take a few times their own size: brackets, strings of brackets, few or many, escapes."""
        for body in (
            b"[" + b"[]," * 1_000_000 + b"0]",
            b"[" + b'"[",' * 1_000_000 + b"0]",
            b"[" + b'{"a":"["},' * 1_000_000 + b"0]",
            b'["' + b"[" * 3_000_000 + b'"]',
            b'["' + b"\\n[" * 1_000_000 + b'"]',
        ):
            tracemalloc.start()
            check_depth(body)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * len(body)


class TestEncoding:
    """UTF-8, and nothing else."""

    @given(
        st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.integers(1, 8),
    )
    def test_agrees_with_python(self, body: bytes, piece: int) -> None:
        """Looked at a few bytes at a time, a body is UTF-8 exactly when Python can decode it in one."""
        try:
            body.decode("utf-8")
            good = True
        except UnicodeDecodeError:
            good = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scanning, "_PIECE", piece)
            assert _reason(check_encoding, body) == (None if good else "not_utf8")

    def test_memory_is_bounded(self) -> None:
        """A body of 20 MB that would be a str of four times that is decoded a piece at a time."""
        body = b'"' + "😀".encode() * 5_000_000 + b'"'
        tracemalloc.start()
        check_encoding(body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000


def _reason(check: Callable[[bytes], None], text: bytes) -> str | None:
    try:
        check(text)
    except Unreadable as exc:
        return exc.reason
    return None


def _too_deep(text: bytes) -> bool:
    return _reason(check_depth, text) == "too_deep"


def _peak(body: bytes) -> int:
    tracemalloc.start()
    try:
        check_encoding(body)
        check_depth(body)
        members(body, where="top", wanted={"x"})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
