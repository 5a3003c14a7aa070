"""Kind `jwt`: a signed JWT with each request."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar

import pytest

from receiver.errors import Unavailable
from receiver.protocol import verification
from receiver.protocol.jose import Rules, read_keys
from receiver.protocol.registry import Credential
from receiver.protocol.verification.google import GoogleCredential
from receiver.protocol.verification.jwt import JwtCredential
from tests.protocol.made_up import NOW, TOKENS, Which, destination, head, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify
from tests.protocol.verification.issuers import P256, P384, RSA_FIRST, RSA_SECOND, Issuer, b64, jwk, jwks, pem

_ISSUER = "https://issuer.example"
_AUDIENCE = "https://receiver.example/redox/main"
_AT = int(NOW.timestamp())
_FIRST, _SECOND = Issuer(key=RSA_FIRST, algorithm="RS256", kid="a"), Issuer(key=RSA_SECOND, algorithm="RS256", kid="b")
_KEYS = {"first": jwks(a=RSA_FIRST), "second": jwks(b=RSA_SECOND)}


def _claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of a right token. A change to None removes a claim."""
    claims = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": "redox", "iat": _AT - 10, "exp": _AT + 290, **changes}
    return {name: value for name, value in claims.items() if value is not None}


def _bearer(text: str) -> Headers:
    return {"authorization": f"Bearer {text}"}


def _signed(header: Mapping[str, Any] | bytes | None = None, issuer: Issuer = _FIRST, **changes: Any) -> Headers:
    return _bearer(issuer.token(_claims(**changes), header))


def _hs256(key: bytes) -> Headers:
    signed = f"{b64(json.dumps({'alg': 'HS256', 'kid': 'a'}).encode())}.{b64(json.dumps(_claims()).encode())}"
    return _bearer(f"{signed}.{b64(hmac.digest(key, signed.encode(), hashlib.sha256))}")


def _unsigned(algorithm: str) -> Headers:
    return _bearer(f"{b64(json.dumps({'alg': algorithm}).encode())}.{b64(json.dumps(_claims()).encode())}.")


def _rules(which: Which = "first", **changes: Any) -> Rules:
    values: dict[str, Any] = {
        "issuers": (_ISSUER,),
        "audiences": (_AUDIENCE,),
        "algorithms": frozenset({"RS256", "ES384"}),
        "keys": _KEYS[which],
        "lifetime": 3600,
        **changes,
    }
    return Rules(**values)


_TOKENS: Mapping[Which, str] = {"first": _FIRST.token(_claims()), "second": _SECOND.token(_claims())}
_DEEP = b'{"alg":"RS256","kid":"a","deep":' + b"[" * 600 + b"]" * 600 + b"}"


class TestJwt(VerificationCases):
    """A signed token with each request."""

    kind = "jwt"
    claims_unrequired = False
    right: ClassVar[Mapping[Which, Headers]] = {which: _bearer(text) for which, text in _TOKENS.items()}
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "another's key": (_signed(issuer=Issuer(key=RSA_SECOND, algorithm="RS256", kid="a")), "jwt_signature_wrong"),
        "unknown kid": (_signed({"kid": "b"}), "jwt_key_unknown"),
        "alg none": (_unsigned("none"), "jwt_algorithm_wrong"),
        "alg None": (_unsigned("None"), "jwt_algorithm_wrong"),
        "no signature": (_bearer(_TOKENS["first"].rpartition(".")[0] + "."), "jwt_signature_wrong"),
        "no alg": (_signed(b'{"kid":"a"}'), "jwt_algorithm_wrong"),
        "alg a list": (_signed({"alg": ["RS256"]}), "jwt_algorithm_wrong"),
        "HS256 over the public key": (_hs256(pem(RSA_FIRST)), "jwt_algorithm_wrong"),
        "HS256 over nothing": (_hs256(b""), "jwt_algorithm_wrong"),
        "another algorithm of the key": (
            _signed(issuer=Issuer(key=RSA_FIRST, algorithm="RS512", kid="a")),
            "jwt_algorithm_wrong",
        ),
        "an algorithm that the key has not": (_signed({"alg": "ES384"}), "jwt_key_unknown"),
        "kid a path": (_signed({"kid": "../../../../etc/passwd"}), "jwt_key_unknown"),
        "kid in SQL": (_signed({"kid": "a' OR '1'='1"}), "jwt_key_unknown"),
        "kid a dict": (_signed({"kid": {"a": "a"}}), "jwt_malformed"),
        "kid a number": (_signed({"kid": 1}), "jwt_malformed"),
        "kid of 10 KB": (_signed({"kid": "a" * 10_000}), "jwt_malformed"),
        "jku": (_signed({"jku": "http://127.0.0.1:1/keys"}), "jwt_header_refused"),
        "x5u": (_signed({"x5u": "http://127.0.0.1:1/cert"}), "jwt_header_refused"),
        "jwk": (_signed({"jwk": {"kty": "oct", "k": "AA"}}), "jwt_header_refused"),
        "x5c": (_signed({"x5c": []}), "jwt_header_refused"),
        "unknown crit": (_signed({"crit": ["exp"], "exp": 1}), "jwt_header_refused"),
        "empty crit": (_signed({"crit": []}), "jwt_header_refused"),
        "b64 false": (_signed({"b64": False, "crit": ["b64"]}), "jwt_header_refused"),
        "compressed": (_signed({"zip": "DEF"}), "jwt_header_refused"),
        "no exp": (_signed(exp=None), "jwt_claim_missing"),
        "no iat": (_signed(iat=None), "jwt_claim_missing"),
        "no iss": (_signed(iss=None), "jwt_claim_missing"),
        "no aud": (_signed(aud=None), "jwt_claim_missing"),
        "exp 10**30": (_signed(exp=10**30), "jwt_malformed"),
        "exp 1e300": (_signed(exp=1e300), "jwt_malformed"),
        "exp text": (_signed(exp=str(_AT + 290)), "jwt_malformed"),
        "exp true": (_signed(exp=True), "jwt_malformed"),
        "exp a list": (_signed(exp=[_AT + 290]), "jwt_malformed"),
        "exp NaN": (_bearer(_FIRST.token(json.dumps(_claims(exp=float("nan"))).encode())), "jwt_malformed"),
        "exp infinite": (_bearer(_FIRST.token(json.dumps(_claims(exp=float("inf"))).encode())), "jwt_malformed"),
        "iat negative": (_signed(iat=-1), "jwt_malformed"),
        "lives too long": (_signed(exp=_AT - 10 + 3601), "jwt_lives_too_long"),
        "expired": (_signed(exp=_AT - 31), "jwt_expired"),
        "iat ahead": (_signed(iat=_AT + 31), "jwt_not_yet_valid"),
        "nbf ahead": (_signed(nbf=_AT + 31), "jwt_not_yet_valid"),
        "nbf text": (_signed(nbf="now"), "jwt_malformed"),
        "wrong aud": (_signed(aud="https://receiver.example/redox/other"), "jwt_audience_wrong"),
        "aud among none": (_signed(aud=["a", "b"]), "jwt_audience_wrong"),
        "aud a dict": (_signed(aud={_AUDIENCE: 1}), "jwt_audience_wrong"),
        "aud with a slash": (_signed(aud=f"{_AUDIENCE}/"), "jwt_audience_wrong"),
        "wrong iss": (_signed(iss="https://issuer.example.evil"), "jwt_issuer_wrong"),
        "iss a list": (_signed(iss=[_ISSUER]), "jwt_issuer_wrong"),
        "wrong sub": (_signed(sub="nobody"), "jwt_subject_wrong"),
        "sub a number": (_signed(sub=1), "jwt_malformed"),
        "no sub": (_signed(sub=None), "jwt_subject_wrong"),
        "header 600 deep": (_signed(_DEEP), "jwt_malformed"),
        "header no object": (_signed(b"[]"), "jwt_malformed"),
        "header no JSON": (_signed(b"alg"), "jwt_malformed"),
        "header not UTF-8": (_signed(b'{"alg":"RS256","kid":"\xff"}'), "jwt_malformed"),
        "header UTF-16": (_signed('{"alg":"RS256"}'.encode("utf-16")), "jwt_malformed"),
        "claims no object": (_bearer(_FIRST.token(b"7")), "jwt_malformed"),
        "claims cut": (_bearer(_FIRST.token(json.dumps(_claims()).encode()[:-1])), "jwt_malformed"),
        "changed claims": (_bearer(_TOKENS["first"].replace(".", f".{b64(b' ')}", 1)), "jwt_malformed"),
        "10 KB": (_signed(pad="a" * 10_000), "jwt_malformed"),
    }
    expired = "jwt_credential_expired"
    revoked = "jwt_credential_expired"
    unknown = "jwt_credential_missing"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The credential of an issuer."""
        return JwtCredential(id=id, rules=_rules(which), subject="redox", expires_at=expires_at, revoked=revoked)

    def presenting(self, value: str) -> Headers:
        """As a Bearer value."""
        return _bearer(value)

    def secrets(self) -> list[str]:
        """The tokens."""
        return [*_TOKENS.values()]


def _door(*credentials: Credential, require: tuple[str, ...] = ("jwt",)) -> Any:
    return destination(*(credentials or (JwtCredential(id=1, rules=_rules()),)), require=require)


class TestShape:
    """Values that are not a signed token."""

    @pytest.mark.parametrize(
        "text",
        [
            _TOKENS["first"] + ".AAAA",
            _TOKENS["first"] + ".",
            "." + _TOKENS["first"],
            _TOKENS["first"] + "=",
            _TOKENS["first"].replace(".", "..", 1),
            "a.b",
            "..",
            "opaque",
            _TOKENS["first"] + "," + _TOKENS["first"],
            _TOKENS["first"].replace("eyJ", "e+J", 1),
            _TOKENS["first"] + " ",
            "\xe9." + _TOKENS["first"],
        ],
    )
    def test_no_kind_claims_it(self, text: str) -> None:
        """Extra segments, padding, or two tokens in one header: no kind claims it, so it proves nothing."""
        assert refusal(_bearer(text), _door()) == "credential_missing"
        assert refusal(_bearer(text), _door(token(), JwtCredential(id=2, rules=_rules()))) == "token_wrong"

    @pytest.mark.parametrize("name", ["Bearer ", "bearer ", "BEARER   "])
    def test_the_case_of_the_scheme(self, name: str) -> None:
        """RFC 9110 11.1: the case of a scheme is ignored, and several spaces may follow it."""
        assert verify({"authorization": name + _TOKENS["first"]}, _door()).credentials == (1,)

    @pytest.mark.parametrize(
        "value",
        ["Basic " + _TOKENS["first"], _TOKENS["first"], "Bearer" + _TOKENS["first"], "Bearer\t" + _TOKENS["first"]],
    )
    def test_another_scheme(self, value: str) -> None:
        """Only a Bearer value is a token."""
        assert refusal({"authorization": value}, _door()) == "credential_missing"

    def test_a_header_of_100_000_levels(self) -> None:
        """It is too large for a header field, and refused without recursion."""
        deep = b'{"alg":"RS256","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        assert refusal(_bearer(_FIRST.token(_claims(), deep)), _door()) == "jwt_malformed"
        assert refusal(_bearer(_FIRST.token(b"[" * 100_000)), _door()) == "jwt_malformed"

    def test_claims_of_5_000_levels(self) -> None:
        """The depth of the claims is limited too."""
        deep = json.dumps(_claims()).encode()[:-1] + b',"x":' + b"[" * 2500 + b"]" * 2500 + b"}"
        assert refusal(_bearer(_FIRST.token(deep)), _door()) == "jwt_malformed"


class TestTimes:
    """The lifetime of a token, by the `now` argument, never by the machine's clock."""

    @pytest.mark.parametrize(
        ("seconds", "reason"),
        [
            (-10 - 31, "jwt_not_yet_valid"),
            (-10 - 30, None),
            (0, None),
            (290 + 29, None),
            (290 + 30, "jwt_expired"),
            (10**8, "jwt_expired"),
            (-(10**8), "jwt_not_yet_valid"),
        ],
    )
    def test_the_window(self, seconds: int, reason: str | None) -> None:
        """A token is valid from iat to exp, and 30 seconds more in either direction."""
        now = NOW.replace(microsecond=0) + timedelta(seconds=seconds)
        if reason is None:
            assert verify(_bearer(_TOKENS["first"]), _door(), now=now).credentials == (1,)
        else:
            assert refusal(_bearer(_TOKENS["first"]), _door(), now=now) == reason

    def test_the_longest_lifetime_is_a_setting(self) -> None:
        """exp − iat is at most the credential's lifetime."""
        for lifetime, good in ((300, True), (299, False)):
            at = _door(JwtCredential(id=1, rules=_rules(lifetime=lifetime)))
            if good:
                verify(_bearer(_TOKENS["first"]), at)
            else:
                assert refusal(_bearer(_TOKENS["first"]), at) == "jwt_lives_too_long"

    def test_fractions(self) -> None:
        """RFC 7519 2: a NumericDate may have a fraction."""
        verify(_signed(iat=_AT - 0.5, exp=_AT + 0.5, nbf=_AT - 0.25), _door())


class TestKeys:
    """The key that verifies a token."""

    @pytest.mark.parametrize(
        ("issuer", "keys"),
        [
            (Issuer(key=RSA_FIRST, algorithm="RS256"), _KEYS["first"]),
            (Issuer(key=RSA_FIRST, algorithm="RS256", kid="anything"), read_keys(pem(RSA_FIRST))),
            (Issuer(key=RSA_FIRST, algorithm="RS256"), read_keys(pem(RSA_FIRST))),
            (Issuer(key=RSA_SECOND, algorithm="RS256"), jwks(a=RSA_FIRST, b=RSA_SECOND)),
            (Issuer(key=P384, algorithm="ES384", kid="ec"), jwks(a=RSA_FIRST, ec=P384)),
        ],
    )
    def test_found(self, issuer: Issuer, keys: Any) -> None:
        """By its key id; if the token or the key has none, by trying the few keys."""
        assert verify(_signed(issuer=issuer), _door(JwtCredential(id=1, rules=_rules(keys=keys)))).credentials == (1,)

    def test_the_number_of_tries_is_limited(self) -> None:
        """A token without a key id is refused if there are many keys."""
        keys = jwks(a=RSA_FIRST, b=RSA_FIRST, c=RSA_FIRST, d=RSA_FIRST, e=RSA_FIRST)
        at = _door(JwtCredential(id=1, rules=_rules(keys=keys)))
        assert refusal(_signed(issuer=Issuer(key=RSA_FIRST, algorithm="RS256")), at) == "jwt_key_unknown"
        assert verify(_signed(issuer=Issuer(key=RSA_FIRST, algorithm="RS256", kid="d")), at).credentials == (1,)

    def test_keys_that_were_not_fetched_yet(self) -> None:
        """A key set that was never fetched verifies nothing."""
        at = _door(JwtCredential(id=1, rules=_rules(keys=())))
        assert refusal(_bearer(_TOKENS["first"]), at) == "jwt_key_unknown"

    def test_a_removed_key_verifies_nothing(self) -> None:
        """A verified token is verified again when the keys change."""
        assert verify(_bearer(_TOKENS["first"]), _door()).credentials == (1,)
        gone = _door(JwtCredential(id=1, rules=_rules(keys=jwks(a=RSA_SECOND))))
        assert refusal(_bearer(_TOKENS["first"]), gone) == "jwt_signature_wrong"

    def test_the_alg_of_the_key(self) -> None:
        """A JWK with alg RS512 does not verify an RS256 token, even if the credential accepts RS256."""
        keys = read_keys(json.dumps({"keys": [jwk(RSA_FIRST, kid="a", alg="RS512")]}).encode())
        at = _door(JwtCredential(id=1, rules=_rules(keys=keys)))
        assert refusal(_bearer(_TOKENS["first"]), at) == "jwt_key_unknown"


class TestSeveral:
    """Several issuers at one destination."""

    def test_each_token_by_its_issuer(self) -> None:
        """Each token is checked with its issuer's credential; the reason is of the check that it came furthest with."""
        other = JwtCredential(
            id=2, rules=_rules(issuers=("https://other.example",), keys=jwks(p=P256), algorithms=frozenset({"ES256"}))
        )
        at = _door(other, JwtCredential(id=1, rules=_rules()))
        assert verify(_bearer(_TOKENS["first"]), at).credentials == (1,)
        es256 = Issuer(key=P256, algorithm="ES256", kid="p")
        assert verify(_signed(issuer=es256, iss="https://other.example"), at).credentials == (2,)
        assert refusal(_signed(issuer=es256), at) == "jwt_issuer_wrong"
        assert refusal(_signed(aud="x"), at) == "jwt_audience_wrong"

    def test_a_kind_leaves_another_kind_s_tokens(self) -> None:
        """If either of two kinds is enough, the one that knows the issuer verifies a token; both refuse an unknown
        issuer's.
        """
        google = GoogleCredential(
            id=2,
            email="redox@example.com",
            rules=_rules(issuers=("https://accounts.google.com",), keys=jwks(p=P256), algorithms=frozenset({"ES256"})),
        )
        at = _door(google, JwtCredential(id=1, rules=_rules()), require=("jwt", "google"))
        assert verify(_bearer(_TOKENS["first"]), at).kinds == {"jwt"}
        es256 = Issuer(key=P256, algorithm="ES256", kid="p")
        proof = verify(
            _signed(issuer=es256, iss="https://accounts.google.com", email="redox@example.com", email_verified=True), at
        )
        assert proof.kinds == {"google"}
        assert refusal(_signed(iss="https://nobody.example"), at) == "jwt_issuer_wrong"

    def test_with_the_verification_token(self) -> None:
        """Redox continues to send its verification token: if both are required, a wrong one refuses."""
        at = _door(token(id=9), JwtCredential(id=1, rules=_rules()), require=("jwt+token",))
        both = {**_bearer(_TOKENS["first"]), "verification-token": TOKENS["first"]}
        assert verify(both, at).credentials == (9, 1)
        assert refusal({**both, "verification-token": TOKENS["second"]}, at) == "token_wrong"


class TestStale:
    """Keys that could not be fetched for too long."""

    @pytest.mark.parametrize(
        "headers",
        [_signed(), _signed({"kid": "new"}), _signed(iat=None)],
        ids=["that was right", "of a new key", "that is bad"],
    )
    def test_neither_accepted_nor_refused_for_good(self, headers: Headers) -> None:
        """The answer is 503 after the head: Redox sends the message again later."""
        at = destination(JwtCredential(id=1, rules=_rules(stale=True)), require=("jwt",))
        with pytest.raises(Unavailable, match="key_set_stale"):
            verification.check_head(head(headers), at, NOW)

    def test_fresh_keys_are_accepted(self) -> None:
        """A token that another credential of the same issuer verifies is accepted, in any order."""
        for rules in ((_rules(stale=True), _rules()), (_rules(), _rules(stale=True))):
            at = destination(
                *(JwtCredential(id=number, rules=each) for number, each in enumerate(rules)), require=("jwt",)
            )
            assert verify(_signed(), at).kinds == {"jwt"}

    def test_others_are_refused_with_their_own_reasons(self) -> None:
        """A token of another issuer, and a malformed one, are refused with 401."""
        at = destination(JwtCredential(id=1, rules=_rules(stale=True)), require=("jwt",))
        assert refusal(_signed(iss="https://issuer.example.evil"), at) == "jwt_issuer_wrong"
        assert refusal(_signed(b"alg"), at) == "jwt_malformed"
