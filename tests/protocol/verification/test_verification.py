"""The kinds put together as a destination requires."""

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
def test_what_is_required(text: list[str], alternatives: tuple[set[str], ...]) -> None:
    """Alternatives are as they are written: each a set of kinds joined by +."""
    assert parse_require(text) == alternatives


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_what_cannot_be_required(text: list[str], said: str) -> None:
    """An unknown kind, an empty one, or no alternative at all is refused, with the kinds that there are."""
    with pytest.raises(ValueError) as refused:
        parse_require(text)
    assert f"unknown kind {said}" in str(refused.value)
    assert all(kind in str(refused.value) for kind in KINDS)


def test_each_kind_is_found_by_its_name() -> None:
    """What `require` names is what `Verified.kinds` will say."""
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}


def test_nothing_required_is_no_door() -> None:
    """A destination without an alternative lets nobody in, whatever is presented."""
    at = destination(token(), require=())
    headers = {"verification-token": TOKENS["first"]}
    assert verification.check_head(head(headers), at, NOW).sufficient is False
    assert refusal(headers, at) == "credential_insufficient"
    assert refusal({}, at) == "credential_missing"


def test_a_kind_that_nobody_knows_is_no_door() -> None:
    """A row that requires a kind which this version does not have lets nobody in by that alternative."""
    headers = {"verification-token": TOKENS["first"]}
    assert (
        refusal(headers, destination(token(), require=("carrier-pigeon", "token+carrier-pigeon")))
        == "credential_insufficient"
    )
