"""The kinds combined as a destination requires."""

from __future__ import annotations

import pytest

from receiver.protocol import verification
from receiver.protocol.verification import KINDS, parse_require
from tests.protocol.made_up import NOW, TOKENS, destination, head, token
from tests.protocol.verification.cases import refusal


@pytest.mark.parametrize(
    ("text", "alternatives"),
    [
        (["token"], ({"token"},)),
        (["hmac+token"], ({"hmac", "token"},)),
        (["token+token"], ({"token"},)),
        (["hmac+token", "token"], ({"hmac", "token"}, {"token"})),
    ],
)
def test_require_is_parsed(text: list[str], alternatives: tuple[set[str], ...]) -> None:
    """Each alternative is a set of kinds, joined by +."""
    assert parse_require(text) == alternatives


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ([], "(none)"),
        ([""], "(none)"),
        (["token+"], "(none)"),
        (["tokens"], "tokens"),
        (["token", "none"], "none"),
        (["Token"], "Token"),
        (["hmac+off"], "off"),
        (["hmac token"], "hmac token"),
    ],
)
def test_an_invalid_require(text: list[str], described: str) -> None:
    """An unknown kind, an empty one, and no alternative are refused; the error lists the kinds."""
    with pytest.raises(ValueError) as refused:
        parse_require(text)
    assert f"unknown kind {described}" in str(refused.value)
    assert all(kind in str(refused.value) for kind in KINDS)


def test_each_kind_is_found_by_its_name() -> None:
    """`require` and `Verified.kinds` have the same names."""
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}


def test_without_an_alternative() -> None:
    """A destination without an alternative accepts no request."""
    at = destination(token(), require=())
    headers = {"verification-token": TOKENS["first"]}
    assert verification.check_head(head(headers), at, NOW).sufficient is False
    assert refusal(headers, at) == "credential_insufficient"
    assert refusal({}, at) == "credential_missing"


def test_an_unknown_kind_in_an_alternative() -> None:
    """An alternative with a kind that this version does not have accepts no request."""
    headers = {"verification-token": TOKENS["first"]}
    assert (
        refusal(headers, destination(token(), require=("carrier-pigeon", "token+carrier-pigeon")))
        == "credential_insufficient"
    )
