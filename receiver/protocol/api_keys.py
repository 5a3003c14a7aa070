"""API keys for Redox: an OAuth key (a private key, from PEM or JWK) or a legacy key with its secret.

Must not send anything, read a file, or generate a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from receiver.errors import ConfigurationError

# Redox: the two regions. Any other base URL is a setting.
US: Final = "https://api.redoxengine.com"
CANADA: Final = "https://api.ca.redoxengine.com"

# RFC 7518 3.3: a key of 2048 bits or larger MUST be used with RSA signatures.
RSA_BITS: Final = 2048

_ACCEPTED: Final = "Redox accepts an RSA key of 2048 bits or more, or an elliptic-curve key on P-384, as PEM or JWK"


# msgspec's errors for bytes that are not JSON. For text that is not UTF-8 it raises no DecodeError.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey


@dataclass(frozen=True, kw_only=True, slots=True)
class OAuthKey:
    """An OAuth API key: a client id from the Redox dashboard, and the private key whose public half Redox knows as
    `kid`.

    An RSA key signs RS384, a P-384 key ES384. Raises ConfigurationError for a key that Redox does not accept.
    """

    client_id: str
    kid: str
    private_key: PrivateKey = field(repr=False)
    scope: str | None = None

    def __post_init__(self) -> None:
        if not self.client_id:
            raise ConfigurationError("an OAuth API key needs its client id: copy it from the Redox dashboard")
        if not self.kid:
            raise ConfigurationError("an OAuth API key needs its kid, the name under which Redox knows the public half")
        _check_private_key(self.private_key)

    @property
    def algorithm(self) -> str:
        """The JWS algorithm that the key signs with."""
        return "RS384" if isinstance(self.private_key, RSAPrivateKey) else "ES384"


@dataclass(frozen=True, kw_only=True, slots=True)
class LegacyKey:
    """A legacy API key and its secret: for one source, and only the Data Model API."""

    api_key: str = field(repr=False)
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.api_key or not self.secret:
            raise ConfigurationError("a legacy API key needs both the key and its secret, from the Redox dashboard")


ApiKey = OAuthKey | LegacyKey


def load_oauth_key(text: str | bytes, *, client_id: str, kid: str | None = None, scope: str | None = None) -> OAuthKey:
    """Return the key of a PEM or JWK text. `kid` may be omitted if a JWK names it.

    PEM from an environment variable may have line ends written as backslash and n. Raises ConfigurationError with an
    explanation that does not quote the text.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("ascii")
        except UnicodeDecodeError:
            raise ConfigurationError(f"the private key is neither PEM nor JWK (no ASCII text); {_ACCEPTED}") from None
    text = text.strip()
    if not text:
        raise ConfigurationError(f"the private key is empty; {_ACCEPTED}")
    if not text.startswith("{"):
        return OAuthKey(client_id=client_id, kid=kid or "", scope=scope, private_key=_from_pem(text))
    jwk = _jwk_members(text)
    private_key = _from_jwk(jwk)
    named = jwk.get("kid")
    key = OAuthKey(
        client_id=client_id, kid=kid or (named if isinstance(named, str) else ""), scope=scope, private_key=private_key
    )
    if jwk.get("alg", key.algorithm) != key.algorithm:
        raise ConfigurationError(
            f"the JWK's alg is not {key.algorithm}, the algorithm this key must sign with for "
            f"Redox; generate a key with alg {key.algorithm}, and register it"
        )
    return key


def _check_private_key(key: object) -> None:
    if isinstance(key, RSAPrivateKey):
        if key.key_size < RSA_BITS:
            raise ConfigurationError(f"the RSA key has {key.key_size} bits, fewer than {RSA_BITS}; {_ACCEPTED}")
    elif isinstance(key, EllipticCurvePrivateKey):
        if not isinstance(key.curve, SECP384R1):
            raise ConfigurationError(f"the elliptic-curve key is on {key.curve.name}, not on P-384; {_ACCEPTED}")
    else:
        raise ConfigurationError(f"Redox does not accept a private key of this type; {_ACCEPTED}")


def _from_pem(text: str) -> PrivateKey:
    if "\n" not in text:
        text = text.replace("\\n", "\n")
    if "-----BEGIN PUBLIC KEY-----" in text or "-----BEGIN CERTIFICATE-----" in text:
        raise ConfigurationError("the file has the public half of a key; give the file with the private key")
    try:
        key = load_pem_private_key(text.encode("ascii", "replace"), password=None)
    except TypeError:  # cryptography's error for a missing password
        raise ConfigurationError(
            "the private key is encrypted with a passphrase; write it without one "
            "(openssl pkey -in KEY -out NEW) and protect the file instead"
        ) from None
    except Exception:  # noqa: BLE001 - the parsers raise several types, whose texts may quote the key
        raise ConfigurationError(f"the private key can't be read as PEM; {_ACCEPTED}") from None
    _check_private_key(key)
    assert isinstance(key, PrivateKey)
    return key


def _jwk_members(text: str) -> dict[str, Any]:
    try:
        jwk = msgspec.json.decode(text, type=dict[str, Any])
    except _UNREADABLE:
        raise ConfigurationError("the private key looks like a JWK, but is not a valid JSON object") from None
    if "keys" in jwk:
        raise ConfigurationError("the file has a set of keys (JWKS); give one private key of it as a JWK")
    if jwk.get("kty") not in ("RSA", "EC"):
        raise ConfigurationError(f"the JWK's kty is neither RSA nor EC; {_ACCEPTED}")
    if "d" not in jwk:
        raise ConfigurationError("the JWK is the public half of a key (it has no member d); give the private half")
    return jwk


def _from_jwk(jwk: Mapping[str, Any]) -> PrivateKey:
    try:
        key = RSAAlgorithm.from_jwk(dict(jwk)) if jwk["kty"] == "RSA" else ECAlgorithm.from_jwk(dict(jwk))
    except Exception:  # noqa: BLE001 - invalid members raise several types, whose texts may quote the key
        raise ConfigurationError(f"the JWK's members are not a valid key; {_ACCEPTED}") from None
    _check_private_key(key)
    assert isinstance(key, PrivateKey)
    return key
