"""Made-up issuers of signed tokens: keys, and a signer that uses neither the code under test nor PyJWT.

Must not verify anything.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from receiver.protocol.jose import VerifyingKey, read_keys

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_FIRST: Final = rsa.generate_private_key(65537, 2048)
RSA_SECOND: Final = rsa.generate_private_key(65537, 2048)
P256: Final = ec.generate_private_key(ec.SECP256R1())
P384: Final = ec.generate_private_key(ec.SECP384R1())
P521: Final = ec.generate_private_key(ec.SECP521R1())
ED25519: Final = ed25519.Ed25519PrivateKey.generate()

_HASHES: Final[Mapping[str, HashAlgorithm]] = {"256": SHA256(), "384": SHA384(), "512": SHA512()}


def b64(data: bytes) -> str:
    """Return base64url without padding (RFC 7515 2)."""
    return urlsafe_b64encode(data).decode().rstrip("=")


def pem(key: PrivateKey) -> bytes:
    """Return the public half in PEM."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: PrivateKey, **members: Any) -> dict[str, Any]:
    """Return the public half as a JWK (RFC 7517, 7518, 8037)."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        return {"kty": "RSA", "n": _number(numbers.n, public.key_size), "e": _number(numbers.e, 24), **members}
    if isinstance(public, ec.EllipticCurvePublicKey):
        point = public.public_numbers()
        curve = {256: "P-256", 384: "P-384", 521: "P-521"}[public.key_size]
        x, y = (_number(number, public.key_size) for number in (point.x, point.y))
        return {"kty": "EC", "crv": curve, "x": x, "y": y, **members}
    return {"kty": "OKP", "crv": "Ed25519", "x": b64(public.public_bytes(Encoding.Raw, PublicFormat.Raw)), **members}


def jwks(**keys: PrivateKey) -> tuple[VerifyingKey, ...]:
    """Return the keys with their key ids, as read from a key set."""
    return read_keys(json.dumps({"keys": [jwk(key, kid=kid) for kid, key in keys.items()]}).encode())


@dataclass(frozen=True, kw_only=True)
class Issuer:
    """A signer of tokens with `key`, `algorithm` and the key id `kid` (None: without a key id)."""

    key: PrivateKey
    algorithm: str
    kid: str | None = None

    def token(self, claims: Mapping[str, Any] | bytes, header: Mapping[str, Any] | bytes | None = None) -> str:
        """Return a signed token. `claims` and `header` may be any bytes; members of a `header` mapping replace the
        defaults.
        """
        if not isinstance(header, bytes):
            usual = {"alg": self.algorithm, "typ": "JWT", **({} if self.kid is None else {"kid": self.kid})}
            header = json.dumps({**usual, **(header or {})}).encode()
        body = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
        signed = f"{b64(header)}.{b64(body)}"
        return f"{signed}.{b64(self._sign(signed.encode()))}"

    def _sign(self, data: bytes) -> bytes:
        key, algorithm = self.key, _HASHES.get(self.algorithm[2:])
        if isinstance(key, rsa.RSAPrivateKey):
            assert algorithm is not None
            pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
            return key.sign(data, pss if self.algorithm.startswith("PS") else padding.PKCS1v15(), algorithm)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            assert algorithm is not None
            r, s = decode_dss_signature(key.sign(data, ec.ECDSA(algorithm)))
            size = (key.key_size + 7) // 8
            return r.to_bytes(size) + s.to_bytes(size)
        return key.sign(data)


def _number(number: int, bits: int) -> str:
    return b64(number.to_bytes((bits + 7) // 8))
