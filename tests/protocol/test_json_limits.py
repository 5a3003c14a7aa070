"""Limits of JSON text: encoding and depth."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from threading import Thread, stack_size

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import Unreadable
from receiver.protocol import json_limits
from receiver.protocol.json_limits import MAX_DEPTH, check_depth, check_encoding
from receiver.protocol.scanning import members
from tests.protocol.json_texts import OBJECT, VALUE, depth, read_json


class TestDepth:
    """`check_depth` compared with the depth of json's values."""

    @given(VALUE | OBJECT, st.integers(0, 4), st.integers(1, 12))
    @settings(max_examples=500)
    def test_is_the_depth_of_the_value(self, text: str, limit: int, piece: int) -> None:
        """It refuses exactly the texts whose value has more levels than the limit, with any strings.

        And however small the pieces are that it looks at.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_limits, "MAX_DEPTH", limit)
            patch.setattr(json_limits, "_PIECE", piece)
            assert _too_deep(text.encode()) == (depth(read_json(text)) > limit)

    @pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a\\n":', b"}]")])
    def test_the_limit_itself_is_allowed(self, opening: bytes, closing: bytes) -> None:
        """MAX_DEPTH levels are accepted, one more is not, with any other content."""
        levels = MAX_DEPTH // (opening.count(b"[") + opening.count(b"{"))
        others = b'["\\n","[[\\"","\\\\",' + b"[]," * MAX_DEPTH
        assert not _too_deep(opening * levels + b"0" + closing * levels)
        assert not _too_deep(others + opening * (levels - 1) + b"0" + closing * (levels - 1) + b"]")
        assert _too_deep(others + opening * levels + b"0" + closing * levels + b"]")

    @pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 5_000, b"]" * 500 + b"[" * 10_000, b'"' + b"[" * 300])
    def test_bytes_that_are_not_json(self, text: bytes) -> None:
        """Brackets that never close are counted without recursion."""
        assert _too_deep(text) or text.startswith(b"]")

    def test_needs_no_stack(self) -> None:
        """In a thread with a stack of 256 KB, 100,000 levels are refused, and MAX_DEPTH levels are parsed."""
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
        """Bodies of brackets, strings of brackets, or escapes take a few times their size."""
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
    """Only UTF-8 is accepted."""

    @given(
        st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.integers(1, 8),
    )
    def test_agrees_with_python(self, body: bytes, piece: int) -> None:
        """A body, checked a few bytes at a time, is UTF-8 exactly if Python can decode it at once."""
        try:
            body.decode("utf-8")
            good = True
        except UnicodeDecodeError:
            good = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_limits, "_PIECE", piece)
            assert _reason(check_encoding, body) == (None if good else "not_utf8")

    def test_memory_is_bounded(self) -> None:
        """A body of 20 MB, which would be a str of four times the size, is decoded in pieces."""
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
