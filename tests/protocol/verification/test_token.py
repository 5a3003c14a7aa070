"""Kind `token`: the verification token."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar

import pytest

from receiver.protocol import verification
from receiver.protocol.message import Verified
from receiver.protocol.registry import Credential
from receiver.protocol.verification.token import TokenCredential
from tests.protocol.made_up import (
    NOW,
    SIGNATURES,
    TOKEN_DIGESTS,
    TOKEN_KEY,
    TOKENS,
    Which,
    destination,
    head,
    signing,
    token,
)
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify

_FIRST, _SECOND = TOKENS["first"], TOKENS["second"]
_JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJub2JvZHkifQ.c2lnbmF0dXJl"


def _token(value: str) -> Headers:
    return {"verification-token": value}


class _TokenCases(VerificationCases):
    """The cases for every header that the token can be in."""

    kind = "token"
    expired = "token_expired"
    revoked = "token_revoked"
    unknown = "token_wrong"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "hmac",
        signing(id=9),
        {"redox-signature": SIGNATURES["first"]},
    )

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """A verification token."""
        return token(which, id=id, expires_at=expires_at, revoked=revoked)

    def secrets(self) -> list[str]:
        """Tokens, digests and the key, also as repr() and in hexadecimal."""
        return [
            *TOKENS.values(),
            *TOKEN_DIGESTS.values(),
            TOKEN_KEY.decode(),
            TOKEN_KEY.hex(),
            repr(bytes.fromhex(TOKEN_DIGESTS["first"])),
        ]


class TestTokenHeader(_TokenCases):
    """The verification token in its own header."""

    right: ClassVar[Mapping[Which, Headers]] = {"first": _token(_FIRST), "second": _token(_SECOND)}
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "wrong": (_token("x" * 36), "token_wrong"),
        "empty": (_token(""), "token_wrong"),
        "non-ASCII": (_token("f\xefrst-made-up-token-0123456789abcdef"), "token_wrong"),
        "not latin-1": (_token("\u20ac"), "token_wrong"),
        "right then wrong": (_token(f"{_FIRST},{_SECOND}"), "token_wrong"),
        "wrong then right": (_token(f"{_SECOND},{_FIRST}"), "token_wrong"),
        "twice the right one": (_token(f"{_FIRST},{_FIRST}"), "token_wrong"),
        "space before": (_token(f" {_FIRST}"), "token_wrong"),
        "space after": (_token(f"{_FIRST} "), "token_wrong"),
        "line feed after": (_token(f"{_FIRST}\n"), "token_wrong"),
        "NUL after": (_token(f"{_FIRST}\0"), "token_wrong"),
        "other case": (_token(_FIRST.upper()), "token_wrong"),
        "a prefix": (_token(_FIRST[:-1]), "token_wrong"),
        "longer": (_token(f"{_FIRST}0"), "token_wrong"),
        "1 MB": (_token("x" * 1_000_000), "token_wrong"),
        "quoted": (_token(f'"{_FIRST}"'), "token_wrong"),
        "as a Bearer value": (_token(f"Bearer {_FIRST}"), "token_wrong"),
        "its digest": (_token(TOKEN_DIGESTS["first"]), "token_wrong"),
        "a signature": (_token(SIGNATURES["first"]), "token_wrong"),
    }

    def presenting(self, value: str) -> Headers:
        """In its own header."""
        return _token(value)


class TestBearer(_TokenCases):
    """The verification token only as a Bearer value."""

    right: ClassVar[Mapping[Which, Headers]] = {
        "first": {"authorization": f"Bearer {_FIRST}"},
        "second": {"authorization": f"bearer  {_SECOND}"},
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "wrong": ({"authorization": f"Bearer {_SECOND}"}, "token_wrong"),
        "empty": ({"authorization": "Bearer "}, "token_wrong"),
        "twice": ({"authorization": f"Bearer {_FIRST},Bearer {_FIRST}"}, "token_wrong"),
        "right, then a JWT": ({"authorization": f"Bearer {_FIRST},Bearer {_JWT}"}, "token_wrong"),
        "space after": ({"authorization": f"Bearer {_FIRST} "}, "token_wrong"),
        "line feed after": ({"authorization": f"Bearer {_FIRST}\n"}, "token_wrong"),
        "non-ASCII": ({"authorization": "Bearer \xef"}, "token_wrong"),
    }

    def presenting(self, value: str) -> Headers:
        """As a Bearer value."""
        return {"authorization": f"Bearer {value}"}


class TestBothHeaders(_TokenCases):
    """The verification token in both headers, as Redox currently sends it."""

    right: ClassVar[Mapping[Which, Headers]] = {
        "first": {**_token(_FIRST), "authorization": f"Bearer {_FIRST}"},
        "second": {**_token(_SECOND), "authorization": f"BEARER {_SECOND}"},
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "right, and another Bearer": ({**_token(_FIRST), "authorization": f"Bearer {_SECOND}"}, "bearer_differs"),
        "right, and an empty Bearer": ({**_token(_FIRST), "authorization": "Bearer "}, "bearer_differs"),
        "wrong, and the right Bearer": ({**_token(_SECOND), "authorization": f"Bearer {_FIRST}"}, "token_wrong"),
        "empty, and the right Bearer": ({**_token(""), "authorization": f"Bearer {_FIRST}"}, "token_wrong"),
        "both wrong": ({**_token(_SECOND), "authorization": f"Bearer {_SECOND}"}, "token_wrong"),
    }

    def presenting(self, value: str) -> Headers:
        """In both headers."""
        return {**_token(value), "authorization": f"Bearer {value}"}

    def test_one_token_in_both(self) -> None:
        """During a rotation two tokens are live, but a request must have the same one in both headers."""
        at = self.at(token("first", id=1), token("second", id=2))
        assert refusal({**_token(_FIRST), "authorization": f"Bearer {_SECOND}"}, at) == "bearer_differs"


class TestAuthorization:
    """`Authorization` is classified by its shape."""

    @pytest.mark.parametrize(
        "value",
        [
            f"Bearer {_JWT}",
            "Bearer a.b.",
            "Basic dXNlcjpwYXNz",
            "AWS4-HMAC-SHA256 Credential=x",
            "Bearer",
            "",
            "Bearerx",
            _FIRST,
            "\u20ac",
            "Digest a=b",
        ],
    )
    def test_values_of_other_kinds(self, value: str) -> None:
        """A value of another kind proves nothing, and does not refuse a request with the right token."""
        at = destination(token())
        assert verification.check_head(head({"authorization": value}), at, NOW).sufficient is False
        assert refusal({"authorization": value}, at) == "credential_missing"
        assert verify({**_token(_FIRST), "authorization": value}, at).credentials == (1,)
        assert refusal({**_token(_SECOND), "authorization": value}, at) == "token_wrong"

    def test_a_token_may_look_like_a_jwt(self) -> None:
        """A token with the shape of a JWT is accepted in its own header, and in both."""
        # printf '%s' "$JWT" | openssl dgst -sha256 -hmac 'a made-up key for digests, 32 b.'
        digest = "b79257596086c976ef7d2f62a47272fd96c8f95cb8cfc64f313b462d092b6754"
        at = destination(TokenCredential(id=3, digest=bytes.fromhex(digest), key=TOKEN_KEY))
        assert verify(_token(_JWT), at).credentials == (3,)
        assert verify({**_token(_JWT), "authorization": f"Bearer {_JWT}"}, at).credentials == (3,)

    def test_without_tokens_a_bearer_value_is_ignored(self) -> None:
        """At a destination that neither requires nor has a token, a Bearer value is not checked."""
        at = destination(signing(), require=("hmac",))
        headers = {"authorization": "Bearer opaque", "verification-token": "x" * 36}
        assert refusal(headers, at) == "credential_missing"
        assert verify({**headers, "redox-signature": SIGNATURES["first"]}, at) == Verified(
            credentials=(1,), kinds=frozenset({"hmac"})
        )

    def test_non_ascii_token(self) -> None:
        """A token of UTF-8 beyond ASCII arrives as latin-1 and is accepted: bytes are compared."""
        # printf 't\xc3\xb6ken-mit-umlaut-0123456789abcdef' |
        #   openssl dgst -sha256 -hmac 'a made-up key for digests, 32 b.'
        digest = "b7ebb60023729a65dc99526fe19a9c61a52a2895c4e4db0ba2b6d00c6ee5a94d"
        at = destination(TokenCredential(id=3, digest=bytes.fromhex(digest), key=TOKEN_KEY))
        wire = "töken-mit-umlaut-0123456789abcdef".encode().decode("latin-1")
        assert verify({**_token(wire), "authorization": f"Bearer {wire}"}, at).credentials == (3,)
        assert refusal(_token("töken-mit-umlaut-0123456789abcdef"), at) == "token_wrong"
