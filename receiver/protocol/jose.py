"""JSON Web Tokens: read without belief, then proved by keys that we hold (RFC 7515, 7517, 7518, 7519, 8725).

Must not fetch a key, nor take one from a token: keys come in as values, and what a token says of where a key is to be
had (jku, x5u, jwk, x5c) refuses it. Must not look at a clock.

The signatures are PyJWT's (its algorithms). Its `decode` is the oracle in the tests, and not called here: it looks at
the clock, reads the token a second time by another parser, and takes several times as long as the signature itself.
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

# RFC 7518 3.3: RSA signatures need a key of 2048 bits or more. An upper bound too: verifying takes time by its square.
RSA_BITS: Final = range(2048, 8192 + 1)
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
# RFC 7518 3.4: each algorithm has its curve.
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
# What a token may be signed with that somebody else made. No HMAC: its key would be no public key, or a public one.
ALGORITHMS: Final = _RSA | {*_CURVES.values(), "EdDSA"}

# gunicorn takes header fields of 8,190 bytes; a token of more than that comes in no header of ours.
MAX_TOKEN: Final = 8 * 1024
# The largest real headers (with an x5t and a long kid) have some 300 characters.
_MAX_HEADER: Final = 2 * 1024
# Clocks of two machines that follow NTP differ by less; Redox itself allows 10 s.
LEEWAY: Final = 30
# Keys that may bear the same name, or none, and are all tried. More would let garbage cost too much work.
MAX_TRIES: Final = 4
MAX_KEYS: Final = 100

# Where a header says how the token is to be read otherwise than as a plain signature (crit, b64, enc, zip), or where a
# key is to be had, nothing good is meant (RFC 8725 3.10; RFC 7515 4.1.11: what is critical and unknown refuses).
_REFUSED: Final = frozenset({"crit", "b64", "enc", "zip", "jku", "jwk", "x5u", "x5c"})
_JWT: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")
_LATEST: Final = 253_402_300_800  # the year 10000: no time of ours is later, and a float holds every second before it
_MENDING: Final = "give RSA of 2048 bits or more, EC on P-256, P-384 or P-521, or Ed25519"
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VerifyingKey:
    """A key that proves tokens, and the algorithms it may do that with. `kid` None: under whatever name.

    `key` is a public key; or bytes, for tokens that we sign ourselves (HS256).
    """

    kid: str | None
    algorithms: frozenset[str]
    key: PublicKey | bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rules:
    """What a token must be: signed by one of `keys` with one of `algorithms`, from an issuer, for an audience.

    `lifetime`: seconds that exp may lie after iat. `leeway`: seconds that the sender's clock may be wrong.
    `other_audiences`: whether it may name audiences that are not of `audiences` as well, as RFC 7519 4.1.3 allows.
    `stale`: the keys could not be fetched for longer than the credential allows.
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
            raise ConfigurationError("tokens need an issuer, an audience and an algorithm to be judged by")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unproved:
    """What a token says of itself, and the bytes that its signature is over. Only to find out who is to judge it."""

    header: Mapping[str, Any] = field(repr=False)
    claims: Mapping[str, Any] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


# A token is looked at to find who judges it, when its head has come in, and again with the body; and one token may come
# with many requests. It is read once, and proved once (see _proved), for neither changes.
@lru_cache(maxsize=256)
def peek(token: bytes) -> Unproved:
    """What the token says of itself. Raises Unverified `jwt_malformed`, whatever the bytes."""
    parts = _JWT.fullmatch(token) if len(token) <= MAX_TOKEN else None
    if parts is None or len(parts[1]) > _MAX_HEADER:
        raise Unverified("jwt_malformed")
    return Unproved(
        header=_members(parts[1]), claims=_members(parts[2]), signed=token[: parts.end(2)], signature=_bytes(parts[3])
    )


def prove(token: bytes, rules: Rules, now: datetime) -> Mapping[str, Any]:
    """The claims, proved: exp, iat, iss and aud are among them.

    Raises Unverified: `jwt_malformed`, `_header_refused`, `_algorithm_wrong`, `_key_unknown`, `_signature_wrong`,
    `_claim_missing`, `_issuer_wrong`, `_audience_wrong`, `_audience_not_alone`, `_not_yet_valid`, `_expired`,
    `_lives_too_long`. Raises Unavailable `key_set_stale` for a token of an issuer whose keys are stale: it may be
    signed with a key that is not trusted any more, or with a new one, so it is neither taken nor refused for good.
    """
    if rules.stale and peek(token).claims.get("iss") in rules.issuers:
        raise Unavailable("key_set_stale")
    claims = _proved(token, rules)
    _check_times(claims, rules, now)
    return claims


# Only what was proved is held: garbage displaces nothing. Rules are told apart by identity, with their keys: by what
# the registry has loaded anew all is proved anew.
@lru_cache(maxsize=1024)
def _proved(token: bytes, rules: Rules) -> Mapping[str, Any]:
    """All of `prove` but the times."""
    unproved = peek(token)
    if not _REFUSED.isdisjoint(unproved.header):
        raise Unverified("jwt_header_refused")
    algorithm, kid = unproved.header.get("alg"), unproved.header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in rules.algorithms:
        raise Unverified("jwt_algorithm_wrong")
    if "kid" in unproved.header and not isinstance(kid, str):
        raise Unverified("jwt_malformed")
    keys = [key for key in rules.keys if algorithm in key.algorithms and (kid is None or key.kid in (kid, None))]
    if not 0 < len(keys) <= MAX_TRIES:
        raise Unverified("jwt_key_unknown")
    signer = _SIGNERS[algorithm]
    if not any(signer.verify(unproved.signed, key.key, unproved.signature) for key in keys):
        raise Unverified("jwt_signature_wrong")
    _check_claims(unproved.claims, rules)
    return unproved.claims


_SIGNERS: Final = {name: jwt.get_algorithm_by_name(name) for name in (*ALGORITHMS, "HS256")}


def _check_claims(claims: Mapping[str, Any], rules: Rules) -> None:
    """That all are there which the rest relies on, of the types of RFC 7519 4.1; issuer and audience are the right."""
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
        # True is an int to Python.
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
    """What was written in base64url, in the one way in which it can be (RFC 4648 3.5: no stray bits at the end)."""
    over = len(part) % 4
    if over == 1 or (over and part[-1] not in _LAST[over]):
        raise Unverified("jwt_malformed")
    return a2b_base64(part.translate(_STANDARD) + b"=" * (-len(part) % 4))


_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
# Two characters beyond a multiple of four hold 8 bits of 12, three 16 of 18: what is left is zero.
_LAST: Final = {2: b"AQgw", 3: b"AEIMQUYcgkosw048"}


def read_keys(text: bytes) -> tuple[VerifyingKey, ...]:
    """The keys of a JWKS, of one JWK, or of PEM (a public key or certificate; then without a name).

    Of a set, keys that are for something else or of a kind that we do not know are left out (RFC 7517 5). Raises
    ConfigurationError when no key remains; never quotes the text.
    """
    if b"-----BEGIN" in text:
        return (_of(_from_pem(text), kid=None, algorithm=None),)
    try:
        check_depth(text)
        document = _decode(text)
    except (Unreadable, msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigurationError("that is neither PEM nor a JWKS: give a file with the sender's public keys") from None
    members = document.get("keys", [document])
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise ConfigurationError(f"a JWKS holds a list of at most {MAX_KEYS} keys")
    keys = tuple(key for member in members if (key := _from_jwk(member)) is not None)
    if not keys:
        raise ConfigurationError(f"none of these keys can prove a signature; {_MENDING}")
    return keys


def _from_pem(text: bytes) -> object:
    if b"PRIVATE KEY" in text:
        raise ConfigurationError("that is a private key: give the public half alone (openssl pkey -in KEY -pubout)")
    try:
        if b"-----BEGIN CERTIFICATE" in text:
            return load_pem_x509_certificate(text).public_key()
        return load_pem_public_key(text)
    except Exception:  # noqa: BLE001 - its parsers raise several kinds
        raise ConfigurationError("the public key can't be read as PEM") from None


def _from_jwk(member: object) -> VerifyingKey | None:
    """The key of one member of a set; None when it is of no use here."""
    if not isinstance(member, dict) or member.get("use", "sig") != "sig" or "d" in member:
        return None
    operations, kid = member.get("key_ops", ["verify"]), member.get("kid")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    try:
        return _of(_KEY_TYPES[member["kty"]].from_jwk(member), kid=kid, algorithm=member.get("alg"))
    except Exception:  # noqa: BLE001 - members of any type reach arithmetic here
        return None


_KEY_TYPES: Final[Mapping[str, Any]] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}


def _of(key: object, *, kid: str | None, algorithm: object) -> VerifyingKey:
    """The key with what it may be used for; `algorithm`, where it is not None, is the only one."""
    if isinstance(key, RSAPublicKey) and key.key_size in RSA_BITS:
        algorithms = _RSA
    elif isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        algorithms = frozenset({_CURVES[key.curve.name]})
    elif isinstance(key, Ed25519PublicKey):
        algorithms = frozenset({"EdDSA"})
    else:
        raise ConfigurationError(f"that key can prove no signature; {_MENDING}")
    if algorithm is not None:
        algorithms &= frozenset({algorithm}) if isinstance(algorithm, str) else frozenset()
        if not algorithms:
            raise ConfigurationError("the key's alg is not one that a key of its kind can be used with")
    return VerifyingKey(kid=kid, algorithms=algorithms, key=key)
