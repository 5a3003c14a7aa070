"""JSON Web Tokens: every algorithm, published vectors, and the content of key files."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import jwt
import pytest
import time_machine
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.jose import ALGORITHMS, LEEWAY, MAX_KEYS, Rules, VerifyingKey, peek, read_keys, verify
from tests.protocol.made_up import NOW
from tests.protocol.verification.issuers import (
    ED25519,
    P256,
    P384,
    P521,
    RSA_FIRST,
    Issuer,
    PrivateKey,
    b64,
    jwk,
    jwks,
    pem,
)

_AT = int(NOW.timestamp())
_CLAIMS = {"iss": "i", "aud": "a", "iat": _AT, "exp": _AT + 60}


def _rules(*keys: VerifyingKey, algorithms: frozenset[str] = ALGORITHMS) -> Rules:
    return Rules(issuers=("i",), audiences=("a",), algorithms=algorithms, keys=keys, lifetime=300)


def _reason(token: str, rules: Rules, now: datetime = NOW) -> str:
    with pytest.raises(Unverified) as refused:
        verify(token.encode(), rules, now)
    return refused.value.reason


_BY_ALGORITHM: list[tuple[PrivateKey, str]] = [
    *((RSA_FIRST, name) for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    (P256, "ES256"),
    (P384, "ES384"),
    (P521, "ES512"),
    (ED25519, "EdDSA"),
]


@pytest.mark.parametrize(("key", "algorithm"), _BY_ALGORITHM, ids=[name for _, name in _BY_ALGORITHM])
def test_every_algorithm(key: PrivateKey, algorithm: str) -> None:
    """A token that cryptography signs is verified with its algorithm, and refused if that is not accepted."""
    token = Issuer(key=key, algorithm=algorithm, kid="k").token(_CLAIMS)
    keys = jwks(k=key)
    assert verify(token.encode(), _rules(*keys), NOW) == _CLAIMS
    assert verify(token.encode(), _rules(*read_keys(pem(key)), algorithms=frozenset({algorithm})), NOW) == _CLAIMS
    assert _reason(token, _rules(*keys, algorithms=ALGORITHMS - {algorithm})) == "jwt_algorithm_wrong"
    body, _, signature = token.rpartition(".")
    changed = f"{body}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"
    assert _reason(changed, _rules(*keys)) == "jwt_signature_wrong"
    assert _reason(f"{body}.{signature[:-8]}", _rules(*keys)) in {"jwt_signature_wrong", "jwt_malformed"}


def test_all_algorithms_are_tested() -> None:
    """Every accepted algorithm is tested above; none of them is HMAC."""
    assert {name for _, name in _BY_ALGORITHM} == ALGORITHMS


# RFC 7515 A.2 and A.3: the token is old, and lacks claims that are required here.
_JOE: Final = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
_A2: Final = (
    f"eyJhbGciOiJSUzI1NiJ9.{_JOE}."
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t"
    "1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12j"
    "zDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQ"
    "Ge77Rw"
)
_A2_KEY: Final = {
    "kty": "RSA",
    "e": "AQAB",
    "n": (
        "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pC"
        "gNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg6"
        "65xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRW"
        "yuXpoQ"
    ),
}
_A3: Final = (
    f"eyJhbGciOiJFUzI1NiJ9.{_JOE}."
    "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
_A3_KEY: Final = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


@pytest.mark.parametrize(("token", "key"), [(_A2, _A2_KEY), (_A3, _A3_KEY)], ids=["RFC 7515 A.2", "RFC 7515 A.3"])
def test_published_vectors(token: str, key: dict[str, str]) -> None:
    """The RFC's signatures verify, so that a missing claim is the reason. With another payload they do not verify."""
    rules = _rules(*read_keys(json.dumps(key).encode()))
    assert _reason(token, rules) == "jwt_claim_missing"
    assert _reason(token.replace(_JOE, b64(b'{"iss":"joe"}')), rules) == "jwt_signature_wrong"


@given(st.binary(max_size=300) | st.text("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789-_.").map(str.encode))
def test_any_bytes(token: bytes) -> None:
    """Any bytes are refused, and raise no other error."""
    for read in (peek, lambda text: verify(text, _rules(*jwks(k=P256)), NOW)):
        with pytest.raises(Unverified, match="jwt_malformed"):
            read(token)


_ANYTHING: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(_ANYTHING)
def test_any_claim(value: Any) -> None:
    """Any claim in a rightly signed token is accepted or refused, and raises no other error."""
    issuer = Issuer(key=ED25519, algorithm="EdDSA", kid="k")
    rules = _rules(*_KEYS)
    for name in ("iss", "aud", "iat", "exp", "nbf", "sub", "jti"):
        token = issuer.token(json.dumps({**_CLAIMS, name: value}).encode())
        with suppress(Unverified):
            assert verify(token.encode(), rules, NOW)["iss"] == "i"


_KEYS = jwks(k=ED25519)


@given(
    st.dictionaries(st.sampled_from(["iss", "aud", "iat", "exp", "nbf", "sub", "jti"]), _ANYTHING, max_size=2),
    st.sampled_from([None, {"alg": "none"}, {"alg": "HS256"}, {"alg": "RS256"}, {"kid": 7}, {"kid": None}]),
    st.integers(0, 9),
)
def test_pyjwt_agrees(changes: dict[str, Any], header: dict[str, Any] | None, spoil: int) -> None:
    """The same tokens are accepted as by PyJWT's decode with the same rules."""
    token = Issuer(key=ED25519, algorithm="EdDSA", kid="k").token(json.dumps({**_CLAIMS, **changes}).encode(), header)
    if spoil == 0:
        token = token[:-2] + ("A" if token[-2] != "A" else "Q") + token[-1]
    try:
        verified: object = dict(verify(token.encode(), _rules(*_KEYS), NOW))
    except Unverified as exc:
        verified = exc.reason
    try:
        with time_machine.travel(NOW, tick=False):
            expected: object = jwt.decode(
                token,
                _KEYS[0].key,
                algorithms=["EdDSA"],
                audience=["a"],
                issuer=["i"],
                subject=None,
                leeway=LEEWAY,
                options={
                    "verify_signature": True,
                    "require": ["exp", "iat", "iss", "aud"],
                    "verify_exp": True,
                    "verify_nbf": True,
                    "verify_iat": True,
                    "verify_aud": True,
                    "verify_iss": True,
                    "verify_sub": True,
                    "verify_jti": True,
                    "strict_aud": False,
                    "enforce_minimum_key_length": True,
                },
            )
    except jwt.PyJWTError:
        assert isinstance(verified, str)
    else:
        # It accepts times as text and any lifetime; msgspec does not accept NaN.
        assert verified == expected or verified in {"jwt_malformed", "jwt_lives_too_long"}


def test_a_proof_is_cached_and_its_expiry_is_not() -> None:
    """A cached token is compared with the time of each request."""
    rules = _rules(*_KEYS)
    token = Issuer(key=ED25519, algorithm="EdDSA").token(_CLAIMS)
    assert verify(token.encode(), rules, NOW) == _CLAIMS
    assert _reason(token, rules, datetime.fromtimestamp(_AT + 90, UTC)) == "jwt_expired"


def test_claims_are_read_only() -> None:
    """The returned claims are read-only, because another request gets the same object."""
    claims: Any = verify(Issuer(key=ED25519, algorithm="EdDSA").token(_CLAIMS).encode(), _rules(*_KEYS), NOW)
    with pytest.raises(TypeError):
        claims["exp"] = 0


@pytest.mark.parametrize("missing", ["issuers", "audiences", "algorithms"])
def test_rules_without_a_rule(missing: str) -> None:
    """Rules that would accept any issuer, audience or algorithm are refused."""
    values: dict[str, Any] = {"issuers": ("i",), "audiences": ("a",), "algorithms": ALGORITHMS, missing: ()}
    with pytest.raises(ConfigurationError):
        Rules(keys=_KEYS, lifetime=300, **values)


class TestReadKeys:
    """The content of a file or a URL with keys."""

    def test_a_set(self) -> None:
        """Each key has its key id and the algorithms of its type."""
        keys = read_keys(
            json.dumps(
                {
                    "keys": [
                        jwk(RSA_FIRST, kid="r", use="sig", key_ops=["verify"]),
                        jwk(P384, kid="e", alg="ES384"),
                        jwk(ED25519),
                    ]
                }
            ).encode()
        )
        assert [(key.kid, sorted(key.algorithms)) for key in keys] == [
            ("r", ["PS256", "PS384", "PS512", "RS256", "RS384", "RS512"]),
            ("e", ["ES384"]),
            (None, ["EdDSA"]),
        ]

    def test_useless_keys_are_left_out(self) -> None:
        """Encryption keys, shared secrets, private keys, unknown types, weak keys and invalid members are left out."""
        weak = rsa.generate_private_key(65537, 1024)
        others: list[Any] = [
            jwk(RSA_FIRST, use="enc"),
            jwk(RSA_FIRST, key_ops=["encrypt"]),
            jwk(RSA_FIRST, key_ops="verify"),
            jwk(RSA_FIRST, alg="RSA-OAEP"),
            jwk(RSA_FIRST, alg="HS256"),
            jwk(RSA_FIRST, alg=7),
            jwk(RSA_FIRST, kid=7),
            jwk(P256, alg="ES384"),
            jwk(P256, d="AAAA"),
            jwk(weak),
            {"kty": "oct", "k": "AAAA"},
            {"kty": "EC", "crv": "P-9"},
            {"kty": ["RSA"]},
            {"kty": "RSA", "n": 5, "e": "AQAB"},
            {"kty": "RSA", "n": "AA", "e": "AQAB"},
            {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA"},
            {},
            7,
            None,
            [],
            "key",
        ]
        keys = read_keys(json.dumps({"keys": [*others, jwk(P256, kid="good")]}).encode())
        assert [key.kid for key in keys] == ["good"]
        with pytest.raises(ConfigurationError, match="none of these keys"):
            read_keys(json.dumps({"keys": others}).encode())

    def test_one_key(self) -> None:
        """A JWK alone, a public key in PEM, a certificate."""
        assert [key.kid for key in read_keys(json.dumps(jwk(P256, kid="one")).encode())] == ["one"]
        assert [key.kid for key in read_keys(pem(P256))] == [None]
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer.example")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(P256.public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW)
            .sign(P256, SHA256())
        )
        (key,) = read_keys(certificate.public_bytes(Encoding.PEM))
        assert isinstance(key.key, ec.EllipticCurvePublicKey)
        assert key.key.public_numbers() == P256.public_key().public_numbers()

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"[]",
            b"{}",
            b"7",
            b'{"keys": {}}',
            b'{"keys": []}',
            b'{"keys": 7}',
            b"\xff\xfe",
            b"<html>",
            b"[" * 100_000,
            b'{"keys": ' + b"[" * 5_000,
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            json.dumps({"keys": [jwk(P256)] * (MAX_KEYS + 1)}).encode(),
        ],
    )
    def test_a_text_without_a_key(self, text: bytes) -> None:
        """Any other text is refused with an explanation."""
        with pytest.raises(ConfigurationError):
            read_keys(text)

    def test_a_private_key_is_refused(self) -> None:
        """A private key is refused, and the error does not quote it."""
        private = P256.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(ConfigurationError, match="private key") as refused:
            read_keys(private)
        assert private.splitlines()[1].decode() not in str(refused.value)

    @pytest.mark.parametrize(
        "key",
        [
            dsa.generate_private_key(1024),
            ed448.Ed448PrivateKey.generate(),
            ec.generate_private_key(ec.SECP256K1()),
            rsa.generate_private_key(65537, 1024),
        ],
        ids=["DSA", "Ed448", "secp256k1", "RSA 1024"],
    )
    def test_keys_of_other_types(self, key: Any) -> None:
        """A key of another type is refused; the error names the accepted types."""
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ConfigurationError, match="P-384"):
            read_keys(public)

    def test_keys_are_not_shown(self) -> None:
        """The repr of a key shows its key id, and nothing of the key."""
        (key,) = jwks(k=P256)
        assert "object at" not in repr(key)
        assert "'k'" in repr(key)
