"""The public half of a signing key as a JWK."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from hashlib import sha256

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from receiver.protocol.api_keys import PrivateKey
from receiver.protocol.jwk import public_jwk, thumbprint

# RFC 7517 appendix A.2 and RFC 7518 6.3.2, 6.2.2: the members of a private key.
PRIVATE_MEMBERS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}


@pytest.fixture(params=["rsa", "ec"])
def key(request: pytest.FixtureRequest) -> PrivateKey:
    return rsa.generate_private_key(65537, 2048) if request.param == "rsa" else ec.generate_private_key(ec.SECP384R1())


def test_the_thumbprint_of_rfc_7638() -> None:
    """The example of RFC 7638 3.1 has its published thumbprint."""
    n = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3o"
        "knjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6"
        "qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awap"
        "JzKnqDKgw"
    )

    assert thumbprint({"kty": "RSA", "n": n, "e": "AQAB"}) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_another_library_reads_it(key: PrivateKey) -> None:
    """PyJWT verifies, with the JWK, its kid and its algorithm, what the private half signed."""
    public = public_jwk(key)
    token = jwt.encode({"sub": "x"}, key, algorithm=public["alg"], headers={"kid": public["kid"]})

    assert jwt.decode(token, jwt.PyJWK(public), algorithms=["RS384", "ES384"]) == {"sub": "x"}


def test_the_kid_is_the_thumbprint(key: PrivateKey) -> None:
    """The kid is the SHA-256 of the required members, sorted, without spaces."""
    public = public_jwk(key)
    required = {name: public[name] for name in sorted({"kty", "n", "e", "crv", "x", "y"} & public.keys())}
    digest = sha256(json.dumps(required).replace(" ", "").encode()).digest()

    assert public["kid"] == urlsafe_b64encode(digest).decode().rstrip("=")


def test_it_has_no_private_member(key: PrivateKey) -> None:
    """It has only the members of a public key."""
    assert not PRIVATE_MEMBERS & public_jwk(key).keys()
    assert public_jwk(key).keys() - {"n", "e", "crv", "x", "y"} == {"kty", "kid", "alg", "use"}


def test_coordinates_keep_their_zeros() -> None:
    """RFC 7518 6.2.1.2: a coordinate has the full 48 octets of P-384, including leading zeros."""
    keys = (ec.derive_private_key(number, ec.SECP384R1()) for number in range(1, 2000))
    short = next(key for key in keys if key.public_key().public_numbers().x < 1 << 376)

    assert len(public_jwk(short)["x"]) == 64
