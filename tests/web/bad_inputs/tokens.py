"""Wrong verification tokens, and handshakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import quote

from tests.support.server import post
from tests.support.site import message
from tests.web.bad_inputs import (
    ACCEPTED,
    CHALLENGED,
    MIB,
    Case,
    Exchange,
    Expected,
    Stand,
    by_server,
    case,
    headers,
    quarantined,
    refused,
)

_WRONG: Final = "wrong" * 8
_CANARY: Final = "CANARY-challenge"


def _token(change: Callable[[str], str | None], *, to: str = "lab") -> Callable[[Stand], Exchange]:
    return headers(lambda stand: {"verification_token": change(stand.token(to))}, to=to)


def _authorization(change: Callable[[str], str], *, others: bool) -> Callable[[Stand], Exchange]:
    def given(stand: Stand) -> Mapping[str, str | None]:
        added: dict[str, str | None] = {"authorization": change(stand.token())}
        return added if others else added | {"verification_token": None}

    return headers(given)


def _twice(order: str) -> Callable[[Stand], Exchange]:
    def make(stand: Stand) -> Exchange:
        made = message()
        lines = {"right": f"verification-token: {stand.token()}\r\n", "wrong": f"verification-token: {_WRONG}\r\n"}
        both = "".join(lines[word] for word in order.split())
        return Exchange(data=stand.sent(made).replace(lines["right"].encode(), both.encode(), 1), kept=(made,))

    return make


def _underscored(stand: Stand) -> Exchange:
    return Exchange(data=stand.sent().replace(b"verification-token", b"verification_token", 1))


def _in_the_query(stand: Stand) -> Exchange:
    target = f"/redox/{stand.name()}?verification-token={stand.token()}"
    return Exchange(data=post(target, message()))


def _another_s(stand: Stand) -> Exchange:
    """The token of another destination."""
    return Exchange(data=stand.sent(verification_token=stand.token("rotating")))


def _nobody_s(name: str) -> Callable[[Stand], Exchange]:
    return lambda stand: Exchange(data=post(f"/redox/{name}", message(), verification_token=stand.token()))


def _handshake(
    challenge: object, *, token: str | None = "right", header: str | None = None, never: bytes | None = None
) -> Callable[[Stand], Exchange]:
    """A handshake by POST. `token` in the body, `header` in the head: "right", another text, or None if absent."""

    def make(stand: Stand) -> Exchange:
        members = {"verification-token": stand.token() if token == "right" else token, "challenge": challenge}
        made = json.dumps({name: value for name, value in members.items() if value is not None}).encode()
        return Exchange(
            data=stand.sent(made, verification_token=stand.token() if header == "right" else header),
            kept=(made,),
            never=never,
        )

    return make


def _by_get(query: str, never: bytes | None = None, **given: str) -> Callable[[Stand], Exchange]:
    def make(stand: Stand) -> Exchange:
        text = query.replace("TOKEN", quote(stand.token()))
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
        return Exchange(
            data=f"GET /redox/{stand.name()}?{text} HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode(), never=never
        )

    return make


def _replayed(stand: Stand) -> Exchange:
    [once] = (_handshake("again")(stand).data,)
    return Exchange(data=3 * once, answers=3)


_MALFORMED: Final = refused(400, "challenge_malformed")
_MISSING: Final = refused(401, "credential_missing")
_TOKEN_WRONG: Final = refused(401, "token_wrong")

CASES: Final[tuple[Case, ...]] = (
    case("no token", _MISSING, _token(lambda _: None)),
    case("a wrong token", _TOKEN_WRONG, _token(lambda _: _WRONG)),
    case("an empty token", _TOKEN_WRONG, _token(lambda _: "")),
    case("a token that is not ASCII", _TOKEN_WRONG, _token(lambda _: "t\xf6ken" * 8)),
    case("a token in the other case", _TOKEN_WRONG, _token(str.swapcase)),
    case("a token's prefix", _TOKEN_WRONG, _token(lambda token: token[:-1])),
    case("a token and more", _TOKEN_WRONG, _token(lambda token: f"{token}x")),
    case("a token padded as base64", _TOKEN_WRONG, _token(lambda token: f"{token}=")),
    case("a token in quotation marks", _TOKEN_WRONG, _token(lambda token: f'"{token}"')),
    # RFC 9110 section 5.5: whitespace around a header value is not part of it.
    case("a token between blanks", ACCEPTED, _token(lambda token: f"  {token}\t ")),
    case("a token of 1 MB", by_server(431), _token(lambda _: MIB * "x")),
    *(
        case(f"two tokens: {order}", _TOKEN_WRONG, _twice(order))
        for order in ("right wrong", "wrong right", "right right")
    ),
    case(
        "a token under another name",
        _MISSING,
        headers(lambda stand: {"verification_token": None, "x_verification_token": stand.token()}),
    ),
    case("a token with an underscore", _MISSING, _underscored),
    case("a token in the query of a POST", _MISSING, _in_the_query),
    case("another destination's token", _TOKEN_WRONG, _another_s),
    case("an unknown destination", refused(401, "destination_unknown"), _nobody_s("nowhere")),
    case(
        "a destination with a NUL",
        refused(401, "destination_unknown"),
        _nobody_s("lab%00"),
        behind=Expected(statuses=None),
    ),
    case("a destination of 3 KB", refused(401, "destination_unknown"), _nobody_s(3000 * "x")),
    case("the token as Bearer", ACCEPTED, _authorization(lambda token: f"Bearer {token}", others=False)),
    case("the token as Bearer too", ACCEPTED, _authorization(lambda token: f"bearer {token}", others=True)),
    case("another Bearer", _TOKEN_WRONG, _authorization(lambda _: f"Bearer {_WRONG}", others=False)),
    case(
        "another Bearer with the token",
        refused(401, "bearer_differs"),
        _authorization(lambda _: f"Bearer {_WRONG}", others=True),
    ),
    case("the token as Basic", _MISSING, _authorization(lambda token: f"Basic {token}", others=False)),
    case("the previous token while rotating", ACCEPTED, headers(lambda _: {}, to="rotating")),
    case(
        "the next token while rotating",
        ACCEPTED,
        headers(lambda stand: {"verification_token": stand.token("next")}, to="rotating"),
    ),
    case(
        "an expired token",
        refused(401, "token_expired"),
        headers(lambda stand: {"verification_token": stand.token("expired")}, to="rotating"),
    ),
    case(
        "a revoked token",
        refused(401, "token_revoked"),
        headers(lambda stand: {"verification_token": stand.token("revoked")}, to="rotating"),
    ),
    # The audit row is found by the address of the case, here as everywhere.
    case(
        "a forged peer",
        _TOKEN_WRONG,
        headers(
            lambda _: {
                "verification_token": _WRONG,
                "x_forwarded_for": "203.0.113.9",
                "forwarded": "for=203.0.113.9",
                "x_real_ip": "203.0.113.9",
            }
        ),
    ),
    case(
        "two forged peers",
        _TOKEN_WRONG,
        headers(lambda _: {"verification_token": _WRONG, "x_forwarded_for": "203.0.113.9, 127.0.0.2"}),
    ),
    case("a handshake", CHALLENGED, _handshake("9a7e1c1e-7b0e-4d0c-8a42-0f6a3a2a7f11")),
    case("a handshake again", Expected(statuses=(200, 200, 200), records=3 * (("answered", None),)), _replayed),
    case("a handshake with a wrong token", _TOKEN_WRONG, _handshake(_CANARY, token=_WRONG, never=_CANARY.encode())),
    case(
        "a handshake with a wrong and the right token",
        _TOKEN_WRONG,
        _handshake(_CANARY, header=_WRONG, never=_CANARY.encode()),
    ),
    case("a handshake without a token", _MISSING, _handshake(_CANARY, token=None, never=_CANARY.encode())),
    *(
        case(f"a challenge: {name}", _MALFORMED, _handshake(challenge, never=b"CANARY"))
        for name, challenge in {
            "HTML": "<script>CANARY</script>",
            "CRLF": "CANARY\r\nSet-Cookie: x=y",
            "an array": ["CANARY"],
            "an object": {"CANARY": 1},
            "a number": 7,
            "empty": "",
            "missing": None,
            "1,000 characters": 1000 * "x",
            "not ASCII": "CANARY\u202e",
        }.items()
    ),
    # Larger than any handshake and without a credential in its head: it is not read.
    case("a challenge of 1 MB", _MISSING, _handshake("CANARY" + MIB * "x", never=b"CANARY")),
    case(
        "a challenge of 1 MB under the right header",
        quarantined("no_meta"),
        _handshake("CANARY" + MIB * "x", header="right", never=b"CANARY"),
    ),
    case(
        "a GET with a wrong token",
        _TOKEN_WRONG,
        _by_get(f"challenge={_CANARY}&verification-token={_WRONG}", _CANARY.encode()),
    ),
    case("a GET without a token", _MISSING, _by_get(f"challenge={_CANARY}", _CANARY.encode())),
    case("a GET with the token", CHALLENGED, _by_get("challenge=abc&verification-token=TOKEN")),
    case("a GET of HTML", _MALFORMED, _by_get("challenge=%3Cscript%3ECANARY&verification-token=TOKEN", b"CANARY")),
    case("a GET of CRLF", _MALFORMED, _by_get("challenge=CANARY%0d%0aX:y&verification-token=TOKEN", b"CANARY")),
    case("a GET without a challenge", _MALFORMED, _by_get("verification-token=TOKEN")),
    # The first of its name.
    case(
        "a GET with two tokens",
        _TOKEN_WRONG,
        _by_get(f"challenge={_CANARY}&verification-token={_WRONG}&verification-token=TOKEN", _CANARY.encode()),
    ),
)
