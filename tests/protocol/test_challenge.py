"""The one-time handshake: recognized and answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import Refusal
from receiver.protocol.challenge import MAX_HANDSHAKE, Handshake, from_body, from_query
from tests.protocol.made_up import head

_UUID = "34b8d6a5-7d0e-4b0c-9d5f-0a1b2c3d4e5f"


class TestFromQuery:
    """GET: every request is a handshake."""

    @pytest.mark.parametrize(
        ("query", "challenge", "token"),
        [
            (f"challenge={_UUID}&verification-token=abc", _UUID, b"abc"),
            (f"challenge={_UUID}", _UUID, None),
            (f"verification-token=a+b%20c&challenge={_UUID}", _UUID, b"a b c"),
            ("", None, None),
            ("challenge", "", None),
            ("challenge=&verification-token=", "", b""),
            ("challenge=a&challenge=b", "a", None),
            ("verification-token=%C3%B6", None, "ö".encode()),
            ("verification-token=%FF", None, "\ufffd".encode()),
            ("verification-token=\udc80", None, b"\xed\xb2\x80"),
            ("&".join(f"a{n}=1" for n in range(100)), None, None),
        ],
    )
    def test_reads_the_query(self, query: str, challenge: str | None, token: bytes | None) -> None:
        """Challenge and token are the first fields with their names, percent-decoded; a flood of fields has neither."""
        assert from_query(head(method="GET", query=query)) == Handshake(challenge=challenge, token=token)

    @given(st.text())
    def test_any_query(self, query: str) -> None:
        """Any query is read without an exception."""
        assert isinstance(from_query(head(method="GET", query=query)), Handshake)


class TestFromBody:
    """POST: an object with a challenge or a token that is not a message."""

    @pytest.mark.parametrize(
        ("body", "challenge", "token"),
        [
            ({"verification-token": "abc", "challenge": _UUID}, _UUID, b"abc"),
            ({"challenge": _UUID}, _UUID, None),
            ({"challenge": _UUID, "verification-token": "ö", "more": [1]}, _UUID, "ö".encode()),
            ({"verification-token": "abc"}, None, b"abc"),
            ({"challenge": ["x"], "verification-token": "abc"}, None, b"abc"),
            ({"challenge": None}, None, None),
            ({"challenge": 5, "verification-token": 6}, None, None),
            ({"challenge": {}, "verification-token": []}, None, None),
        ],
    )
    def test_handshakes(self, body: dict[str, Any], challenge: str | None, token: bytes | None) -> None:
        """A value that is not a string counts as missing; the body is still a handshake, and is refused as one."""
        assert from_body(json.dumps(body, ensure_ascii=False).encode()) == Handshake(challenge=challenge, token=token)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"challenge",
            b'"challenge"',
            b'["challenge"]',
            b"{}",
            b'{"x":"challenge"}',
            b'{"x":"verification-token"}',
            b'{"verification-token":"abc","Meta":{}}',
            b'{"challenge":"x","Meta":{}}',
            b'{"challenge":"x","Meta":null}',
            b'{"challenge":"x","resourceType":"Bundle"}',
            b'{"challenge":"x"} {}',
            b'{"challenge":',
            b'{"challenge":"\\ud800"}',
            b'{"x":{"challenge":"x"}}',
            b'{"challenge":"' + b"x" * MAX_HANDSHAKE + b'"}',
            b'{"challenge":' + b"[" * 3_000 + b"]" * 3_000 + b"}",
        ],
    )
    def test_others(self, body: bytes) -> None:
        """A message with a challenge somewhere is a message, and a body that is not JSON is not a handshake."""
        assert from_body(body) is None

    def test_names_may_be_escaped(self) -> None:
        """Names are compared decoded; of duplicate names the last counts."""
        body = rb'{"ch\u0061llenge":"x","challenge":"y","verification\u002dtoken":"abc"}'
        assert from_body(body) == Handshake(challenge="y", token=b"abc")

    def test_invalid_utf8(self) -> None:
        """Invalid UTF-8 is neither a challenge nor a token."""
        assert from_body(b'{"challenge":"\xff","verification-token":"\xff"}') == Handshake(challenge=None, token=None)

    @given(
        st.binary()
        | st.builds(lambda a, b: a + b'"challenge"' + b, st.binary(), st.binary())
        | st.builds(lambda a: b'{"challenge":' + a + b"}", st.binary())
    )
    def test_any_body(self, body: bytes) -> None:
        """No bytes raise an error: they are not authenticated."""
        from_body(body)


class TestAnswer:
    """The echoed text."""

    @pytest.mark.parametrize("challenge", [_UUID, "x", "a" * 256, "AZaz09._~:+/=-"])
    def test_is_the_challenge(self, challenge: str) -> None:
        """The answer to a challenge of harmless characters is the challenge."""
        assert Handshake(challenge=challenge, token=None).answer() == challenge

    @pytest.mark.parametrize(
        "challenge",
        [
            None,
            "",
            "<script>alert(1)</script>",
            "a b",
            "a\r\nSet-Cookie: x",
            "a\n",
            "a" * 257,
            "a" * 1_000_000,
            "ä",
            "a\0",
            "{{7*7}}",
            "\u202e",
            "a,b",
            'a"b',
        ],
    )
    def test_other_challenges(self, challenge: str | None) -> None:
        """Any other challenge is not echoed: 400, `challenge_malformed`."""
        with pytest.raises(Refusal) as refused:
            Handshake(challenge=challenge, token=None).answer()
        assert (refused.value.reason, refused.value.status_hint) == ("challenge_malformed", 400)
