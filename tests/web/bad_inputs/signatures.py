"""Webhook signatures and signed tokens that prove nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import Any, Final

from receiver.simulator.signer import Signer
from tests.protocol.verification.issuers import RSA_FIRST, RSA_SECOND, Issuer, b64, jwk, pem
from tests.support.site import message
from tests.web.bad_inputs import ACCEPTED, MIB, Case, Exchange, Expected, Stand, by_server, case, refused

SECRET: Final = "a made-up secret of some length"
TIME: Final = "x-time"
ISSUER: Final = "https://issuer.example"
AUDIENCE: Final = "us"
# What the destinations `timed`, `signed` and `bearing` require.
KEYS: Final = json.dumps({"keys": [jwk(RSA_FIRST, kid="a")]})
HMAC: Final[Mapping[str, Any]] = {"header": "redox-signature", "timestamp_header": TIME}

_TIMED: Final = Signer(secret=SECRET.encode(), timestamp_header=TIME)
_SIGNED: Final = Signer(secret=SECRET.encode())
_WRONG: Final = refused(401, "signature_wrong")
_MALFORMED: Final = refused(401, "signature_malformed")
_STALE: Final = refused(401, "signature_stale")


def _timed(
    change: Callable[[dict[str, str]], Mapping[str, str | None]],
    *,
    seconds: float = 0,
    other: Callable[[bytes], bytes] = bytes,
) -> Callable[[Stand], Exchange]:
    """A message signed at now + `seconds`, its two headers (redox-signature, x-time) changed, and then its body."""

    def make(stand: Stand) -> Exchange:
        made = message()
        given = {name.lower(): value for name, value in _TIMED.headers(made, now=time.time() + seconds).items()}
        named = {name.replace("-", "_"): value for name, value in change(given).items()}
        return Exchange(data=stand.sent(other(made), named, to="timed"), kept=(made,))

    return make


def _signature(change: Callable[[str], str | None]) -> Callable[[Stand], Exchange]:
    return _timed(lambda given: {**given, "redox-signature": change(given["redox-signature"])})


def _stamp(stamp: str) -> Callable[[Stand], Exchange]:
    """A message signed with this time stamp."""

    def make(stand: Stand) -> Exchange:
        made = message()
        mac = hmac.digest(SECRET.encode(), stamp.encode() + b"." + made, hashlib.sha256)
        return Exchange(
            data=stand.sent(made, {"redox_signature": b64encode(mac).decode(), "x_time": stamp}, to="timed")
        )

    return make


def _several(count: int) -> Callable[[Stand], Exchange]:
    """This many signatures in one header field, of which the last is right."""

    def make(stand: Stand) -> Exchange:
        made = message()
        right = _SIGNED.headers(made, now=0)["Redox-Signature"]
        wrong = b64encode(32 * b"\0").decode()
        return Exchange(
            data=stand.sent(made, redox_signature=",".join([*(count - 1) * [wrong], right]), to="signed"), kept=(made,)
        )

    return make


def _again(stand: Stand) -> Exchange:
    once = _timed(dict)(stand)
    return Exchange(data=2 * once.data, kept=once.kept, answers=2)


def _reordered(made: bytes) -> bytes:
    return json.dumps(dict(reversed(json.loads(made).items()))).encode()


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": now - 10, "exp": now + 290, **changes}
    return {name: value for name, value in claims.items() if value is not None}


def _bearing(token: Callable[[Stand], str]) -> Callable[[Stand], Exchange]:
    def make(stand: Stand) -> Exchange:
        made = message()
        return Exchange(data=stand.sent(made, authorization=f"Bearer {token(stand)}", to="bearing"), kept=(made,))

    return make


def _jwt(
    header: Mapping[str, Any] | bytes | None = None, *, key: Any = RSA_FIRST, **changes: Callable[[], Any] | Any
) -> Callable[[Stand], Exchange]:
    """A token of `key`; `TRAP` in a header is the trap's URL. `changes` are claims, or what makes one at its time."""

    def token(stand: Stand) -> str:
        text = (
            {
                name: value.replace("TRAP", stand.trap) if isinstance(value, str) else value
                for name, value in header.items()
            }
            if isinstance(header, Mapping)
            else header
        )
        claims = {name: value() if callable(value) else value for name, value in changes.items()}
        return Issuer(key=key, algorithm="RS256", kid="a").token(_claims(**claims), text)

    return _bearing(token)


def _unsigned(_: Stand) -> str:
    return f"{b64(json.dumps({'alg': 'none'}).encode())}.{b64(json.dumps(_claims()).encode())}."


def _hs256(_: Stand) -> str:
    signed = f"{b64(json.dumps({'alg': 'HS256', 'kid': 'a'}).encode())}.{b64(json.dumps(_claims()).encode())}"
    return f"{signed}.{b64(hmac.digest(pem(RSA_FIRST), signed.encode(), hashlib.sha256))}"


def _right(_: Stand) -> str:
    return Issuer(key=RSA_FIRST, algorithm="RS256", kid="a").token(_claims())


def _nested(depth: int) -> bytes:
    return b'{"alg":"RS256","kid":"a","x":' + depth * b"[" + depth * b"]" + b"}"


_HEADER: Final = refused(401, "jwt_header_refused")
_JWT_MALFORMED: Final = refused(401, "jwt_malformed")

CASES: Final[tuple[Case, ...]] = (
    case("a signature", ACCEPTED, _timed(dict)),
    case(
        "a signature again", Expected(statuses=(200, 200), records=(("unhandled", None), ("duplicate", None))), _again
    ),
    case("no signature", refused(401, "credential_insufficient"), _signature(lambda _: None)),
    case("an empty signature", _MALFORMED, _signature(lambda _: "")),
    case("a signature that is not base64", _MALFORMED, _signature(lambda right: f"!{right[1:]}")),
    case("a signature that is not ASCII", _MALFORMED, _signature(lambda right: f"\xf6{right}")),
    case(
        "a signature that is too short", _MALFORMED, _signature(lambda right: b64encode(b64decode(right)[:-1]).decode())
    ),
    case(
        "a signature that is too long",
        _MALFORMED,
        _signature(lambda right: b64encode(b64decode(right) + b"x").decode()),
    ),
    case("a signature of 4 KB", _MALFORMED, _signature(lambda _: 4096 * "A")),
    case("a signature of 1 MB", by_server(431), _signature(lambda _: MIB * "A")),
    case("a changed byte", _WRONG, _timed(dict, other=lambda made: made.replace(b"Arrival", b"Arriva1"))),
    case("a byte more", _WRONG, _timed(dict, other=lambda made: made + b"\n")),
    case("keys in another order", _WRONG, _timed(dict, other=_reordered)),
    case("a signature of an hour ago", _STALE, _timed(dict, seconds=-3600)),
    case("a signature of tomorrow", _STALE, _timed(dict, seconds=86400)),
    case("no time stamp", _STALE, _timed(lambda given: {**given, TIME: None})),
    case("another time stamp", _WRONG, _timed(lambda given: {**given, TIME: str(int(given[TIME]) - 1)})),
    *(
        case(f"the time stamp {stamp[:12]}", _STALE, _stamp(stamp))
        for stamp in ("NaN", "-1", 30 * "9", "1e9", "", "0x5f5e100", "\u0661\u0662".encode().decode("latin-1"))
    ),
    case("three signatures, the last valid", ACCEPTED, _several(3)),
    case("a hundred signatures", _MALFORMED, _several(100)),
    case("a thousand signatures", by_server(431), _several(1000)),
    case("a signed token", ACCEPTED, _jwt()),
    case(
        "no signed token",
        refused(401, "credential_insufficient"),
        lambda stand: Exchange(data=stand.sent(to="bearing")),
    ),
    case("alg none", refused(401, "jwt_algorithm_wrong"), _bearing(_unsigned)),
    case("HS256 over the public key", refused(401, "jwt_algorithm_wrong"), _bearing(_hs256)),
    case("another's key", refused(401, "jwt_signature_wrong"), _jwt(key=RSA_SECOND)),
    *(
        case(f"kid {str(kid)[:12]}", refused(401, "jwt_key_unknown"), _jwt({"kid": kid}))
        for kid in ("unknown", "../../../../etc/passwd", "a' OR '1'='1", "TRAP", "a\x00", "a" * 1000)
    ),
    case("kid a dict", _JWT_MALFORMED, _jwt({"kid": {"a": "a"}})),
    case("kid of 3 KB", _JWT_MALFORMED, _jwt({"kid": 3000 * "a"})),
    case("kid of 10 KB", by_server(431), _jwt({"kid": 10_000 * "a"})),
    case("jku", _HEADER, _jwt({"jku": "TRAP"})),
    case("x5u", _HEADER, _jwt({"x5u": "TRAP"})),
    case("jwk", _HEADER, _jwt({"jwk": jwk(RSA_SECOND, kid="a")}, key=RSA_SECOND)),
    case("unknown crit", _HEADER, _jwt({"crit": ["CANARY"], "CANARY": 1})),
    case("an issuer that is a URL", refused(401, "jwt_issuer_wrong"), lambda stand: _jwt(iss=stand.trap)(stand)),
    case("no exp", refused(401, "jwt_claim_missing"), _jwt(exp=None)),
    case("exp 10**30", _JWT_MALFORMED, _jwt(exp=10**30)),
    case("exp in a year", refused(401, "jwt_lives_too_long"), _jwt(exp=lambda: int(time.time()) + 31_536_000)),
    case(
        "expired",
        refused(401, "jwt_expired"),
        _jwt(iat=lambda: int(time.time()) - 600, exp=lambda: int(time.time()) - 300),
    ),
    case("nbf ahead", refused(401, "jwt_not_yet_valid"), _jwt(nbf=lambda: int(time.time()) + 200)),
    case("a wrong aud", refused(401, "jwt_audience_wrong"), _jwt(aud="them")),
    case("a wrong iss", refused(401, "jwt_issuer_wrong"), _jwt(iss="https://other.example")),
    # A Bearer value that does not have the form of a JWT counts as a verification token, and is a wrong one.
    case("extra segments", refused(401, "bearer_differs"), _bearing(lambda stand: f"{_right(stand)}.x.y")),
    case(
        "a token and another",
        refused(401, "bearer_differs"),
        _bearing(lambda stand: f"{_right(stand)}, {_right(stand)}"),
    ),
    case("a header of 500 levels", _JWT_MALFORMED, _jwt(_nested(500))),
    case("a header of 100,000 levels", by_server(431), _jwt(_nested(100_000))),
    case("a header that is not JSON", _JWT_MALFORMED, _jwt(b"CANARY")),
)
