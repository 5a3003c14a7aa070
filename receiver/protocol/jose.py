"""JSON Web Tokens: parsed, then verified with given keys (RFC 7515, 7517, 7518, 7519, 8725).

Must not fetch a key or take one from a token: keys are arguments, and a token whose header names a source of keys (jku,
x5u, jwk, x5c) is refused. Must not read a clock.

PyJWT's algorithms verify the signatures. Its `decode` is the reference in the tests but is not called here: it reads
the clock, parses the token again with another parser, and takes several times as long as the signature.
"""

from __future__ import annotations

import re
from binascii import a2b_base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from receiver.errors import ConfigurationError, Unavailable, Unreadable, Unverified
from receiver.protocol.json_limits import check_depth

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

# RFC 7518 3.3: RSA signatures need a key of 2048 bits or more. The upper bound limits the time of a verification, which
# grows with the square.
RSA_BITS: Final = range(2048, 8192 + 1)
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
# RFC 7518 3.4: the curve of each algorithm.
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
# The algorithms for tokens of an issuer. HMAC is not one: an HMAC key cannot be public.
ALGORITHMS: Final = _RSA | {*_CURVES.values(), "EdDSA"}

# gunicorn accepts header fields of 8,190 bytes.
MAX_TOKEN: Final = 8 * 1024
# The largest real headers (with an x5t and a long kid) have about 300 characters.
_MAX_HEADER: Final = 2 * 1024
# Seconds. Clocks that follow NTP differ by less; Redox allows 10 s.
LEEWAY: Final = 30
# The number of keys with the same id, or without one, that are tried. More would make invalid tokens too expensive.
MAX_TRIES: Final = 4
MAX_KEYS: Final = 100

# Header parameters of anything but a plain signature (crit, b64, enc, zip), or with a source of keys (RFC 8725 3.10;
# RFC 7515 4.1.11: an unknown critical extension refuses the token).
_REFUSED: Final = frozenset({"crit", "b64", "enc", "zip", "jku", "jwk", "x5u", "x5c"})
_JWT: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")
_LATEST: Final = 253_402_300_800  # the year 10000: datetime ends there, and a float represents every second before it
_ACCEPTED: Final = "give RSA of 2048 bits or more, EC on P-256, P-384 or P-521, or Ed25519"
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VerifyingKey:
    """A key that verifies tokens, and its algorithms. `kid` None: it matches every key id.

    `key`: a public key, or bytes for this receiver's own tokens (HS256).
    """

    kid: str | None
    algorithms: frozenset[str]
    key: PublicKey | bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rules:
    """The rules for a token: the accepted issuers, audiences, algorithms and keys.

    `lifetime`: the most seconds from iat to exp. `leeway`: the most seconds by which the clocks may differ.
    `other_audiences`: whether the token may name other audiences too, as RFC 7519 4.1.3 allows. `stale`: the keys could
    not be fetched for longer than the credential allows.
    """

    issuers: tuple[str, ...]
    audiences: tuple[str, ...]
    algorithms: frozenset[str]
    keys: tuple[VerifyingKey, ...] = field(repr=False)
    lifetime: int
    leeway: int = LEEWAY
    other_audiences: bool = True
    stale: bool = False

    def __post_init__(self) -> None:
        if not self.issuers or not self.audiences or not self.algorithms:
            raise ConfigurationError("the rules for a token need an issuer, an audience and an algorithm")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnverifiedToken:
    """A parsed token, not verified. Must be used only to find the kind that verifies it."""

    header: Mapping[str, Any] = field(repr=False)
    claims: Mapping[str, Any] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


# A token is parsed to find its kind, and again to verify it, and one token may come with many requests. So parsing and
# verification (see _verified), whose results do not change, are cached.
@lru_cache(maxsize=256)
def peek(token: bytes) -> UnverifiedToken:
    """Parse a token without verifying it. Raises Unverified `jwt_malformed` for any invalid bytes."""
    parts = _JWT.fullmatch(token) if len(token) <= MAX_TOKEN else None
    if parts is None or len(parts[1]) > _MAX_HEADER:
        raise Unverified("jwt_malformed")
    return UnverifiedToken(
        header=_members(parts[1]), claims=_members(parts[2]), signed=token[: parts.end(2)], signature=_bytes(parts[3])
    )


def verify(token: bytes, rules: Rules, now: datetime) -> Mapping[str, Any]:
    """Verify a token. Returns its claims, with exp, iat, iss and aud.

    Raises Unverified: `jwt_malformed`, `_header_refused`, `_algorithm_wrong`, `_key_unknown`, `_signature_wrong`,
    `_claim_missing`, `_issuer_wrong`, `_audience_wrong`, `_audience_not_alone`, `_not_yet_valid`, `_expired`,
    `_lives_too_long`. Raises Unavailable `key_set_stale` for a token of an issuer whose keys are stale: its key may
    have been withdrawn, or be too new to be known, so the token is neither accepted nor refused for good.
    """
    if rules.stale and peek(token).claims.get("iss") in rules.issuers:
        raise Unavailable("key_set_stale")
    claims = _verified(token, rules)
    _check_times(claims, rules, now)
    return claims


# Only verified tokens are cached: invalid ones displace nothing. Rules are compared by identity: when the registry is
# loaded again, every token is verified again.
@lru_cache(maxsize=1024)
def _verified(token: bytes, rules: Rules) -> Mapping[str, Any]:
    """Check everything but the times."""
    parsed = peek(token)
    if not _REFUSED.isdisjoint(parsed.header):
        raise Unverified("jwt_header_refused")
    algorithm, kid = parsed.header.get("alg"), parsed.header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in rules.algorithms:
        raise Unverified("jwt_algorithm_wrong")
    if "kid" in parsed.header and not isinstance(kid, str):
        raise Unverified("jwt_malformed")
    keys = [key for key in rules.keys if algorithm in key.algorithms and (kid is None or key.kid in (kid, None))]
    if not 0 < len(keys) <= MAX_TRIES:
        raise Unverified("jwt_key_unknown")
    signer = _SIGNERS[algorithm]
    if not any(signer.verify(parsed.signed, key.key, parsed.signature) for key in keys):
        raise Unverified("jwt_signature_wrong")
    _check_claims(parsed.claims, rules)
    return parsed.claims


_SIGNERS: Final = {name: jwt.get_algorithm_by_name(name) for name in (*ALGORITHMS, "HS256")}


def _check_claims(claims: Mapping[str, Any], rules: Rules) -> None:
    """Check that the required claims exist with the types of RFC 7519 4.1, and compare issuer and audience."""
    for name in ("exp", "iat", "iss", "aud"):
        if claims.get(name) is None:
            raise Unverified("jwt_claim_missing")
    for name in ("sub", "jti"):
        if not isinstance(claims.get(name, ""), str):
            raise Unverified("jwt_malformed")
    if claims["iss"] not in rules.issuers:
        raise Unverified("jwt_issuer_wrong")
    named = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
    ours = [each for each in named if each in rules.audiences]
    if not ours:
        raise Unverified("jwt_audience_wrong")
    if len(ours) < len(named) and not rules.other_audiences:
        raise Unverified("jwt_audience_not_alone")


def _check_times(claims: Mapping[str, Any], rules: Rules, now: datetime) -> None:
    issued, expires, begins = claims["iat"], claims["exp"], claims.get("nbf", claims["iat"])
    for time in (issued, expires, begins):
        # True is an int in Python.
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < _LATEST:
            raise Unverified("jwt_malformed")
    at = now.timestamp()
    if at >= expires + rules.leeway:
        raise Unverified("jwt_expired")
    if max(issued, begins) > at + rules.leeway:
        raise Unverified("jwt_not_yet_valid")
    if expires - issued > rules.lifetime:
        raise Unverified("jwt_lives_too_long")


def _members(part: bytes) -> Mapping[str, Any]:
    text = _bytes(part)
    try:
        check_depth(text)
        members: dict[str, Any] = _decode(text)
    except (Unreadable, msgspec.DecodeError, UnicodeDecodeError):
        raise Unverified("jwt_malformed") from None
    return MappingProxyType(members)


def _bytes(part: bytes) -> bytes:
    """Decode base64url in its canonical form (RFC 4648 3.5: unused bits at the end are zero)."""
    over = len(part) % 4
    if over == 1 or (over and part[-1] not in _LAST[over]):
        raise Unverified("jwt_malformed")
    return a2b_base64(part.translate(_STANDARD) + b"=" * (-len(part) % 4))


_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
# Two characters beyond a multiple of four have 12 bits for 8, three have 18 bits for 16: the rest must be zero.
_LAST: Final = {2: b"AQgw", 3: b"AEIMQUYcgkosw048"}


def read_keys(text: bytes) -> tuple[VerifyingKey, ...]:
    """Return the keys of a JWKS, a JWK, or PEM (a public key or a certificate, without a key id).

    Keys of a set with another use or an unknown type are left out (RFC 7517 5). Raises ConfigurationError if no key
    remains, without quoting the text.
    """
    if b"-----BEGIN" in text:
        return (_verifying_key(_from_pem(text), kid=None, algorithm=None),)
    try:
        check_depth(text)
        document = _decode(text)
    except (Unreadable, msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigurationError(
            "the file is neither PEM nor a JWKS: give a file with the sender's public keys"
        ) from None
    members = document.get("keys", [document])
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise ConfigurationError(f"a JWKS holds a list of at most {MAX_KEYS} keys")
    keys = tuple(key for member in members if (key := _from_jwk(member)) is not None)
    if not keys:
        raise ConfigurationError(f"none of these keys can verify a signature; {_ACCEPTED}")
    return keys


def _from_pem(text: bytes) -> object:
    if b"PRIVATE KEY" in text:
        raise ConfigurationError("the file has a private key: give only the public half (openssl pkey -in KEY -pubout)")
    try:
        if b"-----BEGIN CERTIFICATE" in text:
            return load_pem_x509_certificate(text).public_key()
        return load_pem_public_key(text)
    except Exception:  # noqa: BLE001 - the parsers raise several types
        raise ConfigurationError("the public key can't be read as PEM") from None


def _from_jwk(member: object) -> VerifyingKey | None:
    """Return the key of one member of a set; None if it cannot be used."""
    if not isinstance(member, dict) or member.get("use", "sig") != "sig" or "d" in member:
        return None
    operations, kid = member.get("key_ops", ["verify"]), member.get("kid")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    try:
        return _verifying_key(_KEY_TYPES[member["kty"]].from_jwk(member), kid=kid, algorithm=member.get("alg"))
    except Exception:  # noqa: BLE001 - invalid members raise several types
        return None


_KEY_TYPES: Final[Mapping[str, Any]] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}


def _verifying_key(key: object, *, kid: str | None, algorithm: object) -> VerifyingKey:
    """Return the key with the algorithms that it may be used with; `algorithm`, if not None, is the only one."""
    if isinstance(key, RSAPublicKey) and key.key_size in RSA_BITS:
        algorithms = _RSA
    elif isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        algorithms = frozenset({_CURVES[key.curve.name]})
    elif isinstance(key, Ed25519PublicKey):
        algorithms = frozenset({"EdDSA"})
    else:
        raise ConfigurationError(f"that key cannot verify a signature; {_ACCEPTED}")
    if algorithm is not None:
        algorithms &= frozenset({algorithm}) if isinstance(algorithm, str) else frozenset()
        if not algorithms:
            raise ConfigurationError("the key's alg does not match its type")
    return VerifyingKey(kid=kid, algorithms=algorithms, key=key)
