"""The public half of a signing key as a JWK (RFC 7517), with its thumbprint (RFC 7638) as key id.

Must not reveal a member of the private half, nor generate or load a key.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from receiver.protocol.api_keys import PrivateKey


def public_jwk(key: PrivateKey) -> dict[str, str]:
    """Return the public half of an RSA or P-384 key: the members of RFC 7518 6.2.1 and 6.3.1, with kid, alg and use."""
    if isinstance(key, RSAPrivateKey):
        rsa = key.public_key().public_numbers()
        members = {
            "kty": "RSA",
            "n": _number(rsa.n, (rsa.n.bit_length() + 7) // 8),
            "e": _number(rsa.e, (rsa.e.bit_length() + 7) // 8),
        }
        algorithm = "RS384"
    else:
        point, octets = key.public_key().public_numbers(), (key.curve.key_size + 7) // 8
        members = {"kty": "EC", "crv": "P-384", "x": _number(point.x, octets), "y": _number(point.y, octets)}
        algorithm = "ES384"
    return {**members, "kid": thumbprint(members), "alg": algorithm, "use": "sig"}


def thumbprint(members: Mapping[str, str]) -> str:
    """Return the thumbprint (RFC 7638 3): SHA-256 of the required members, sorted and without spaces, as base64url."""
    text = json.dumps(members, sort_keys=True, separators=(",", ":"))
    return _base64url(sha256(text.encode()).digest())


def _number(value: int, octets: int) -> str:
    return _base64url(value.to_bytes(octets, "big"))


def _base64url(octets: bytes) -> str:
    return urlsafe_b64encode(octets).rstrip(b"=").decode()
