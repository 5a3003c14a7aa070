"""Proving ourselves to Redox: the keys we hold, the token requests built from them, and what the replies say.

Must not send anything, read a file, look at a clock or make anything random: text, `now` and `jti` come in as
arguments. Imports nothing of ours but receiver.errors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from receiver.errors import ConfigurationError

# Redox: the two regions. Any other base URL is a setting.
US: Final = "https://api.redoxengine.com"
CANADA: Final = "https://api.ca.redoxengine.com"

# Redox: an assertion expires 300 s after `iat`, and `iat` may lie at most 5 minutes back.
ASSERTION_SECONDS: Final = 300
# Redox: an OAuth token is good for 5 minutes. Assumed where a reply does not say, or says it unreadably.
TOKEN_SECONDS: Final = 300.0
# Redox: no token of either kind has ever been documented to live longer than a day; a reply that promises more is not
# believed, for it comes of a clock that is wrong by days.
LONGEST_TOKEN_SECONDS: Final = 86_400.0
# A token is renewed this long before it ends, so that no request carries one that ends on its way: longer than a slow
# connection takes, a tenth of the documented lifetime. Never more than half of a shorter life.
RENEWAL_MARGIN: Final = 30.0
# RFC 7518 3.3: a key of 2048 bits or larger MUST be used with RSA signatures.
RSA_BITS: Final = 2048

_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
# RFC 6750 2.1: what a bearer token may consist of. Anything else could break the header it is put into.
_BEARER: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*")
_MENDING: Final = "Redox takes an RSA key of 2048 bits or more, or an elliptic-curve key on P-384, as PEM or JWK"

# What msgspec raises for bytes that are not JSON: for text that is not UTF-8 it raises no DecodeError.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey


@dataclass(frozen=True, kw_only=True, slots=True)
class OAuthKey:
    """An OAuth API key: the client id of the Redox dashboard, and a private key whose public half Redox knows as `kid`.

    An RSA key signs RS384, a P-384 key ES384. Raises ConfigurationError when the key is of no use to Redox.
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
    """A legacy API key and its secret: one source, the Data Model API only."""

    api_key: str = field(repr=False)
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.api_key or not self.secret:
            raise ConfigurationError("a legacy API key needs both the key and its secret, from the Redox dashboard")


ApiKey = OAuthKey | LegacyKey


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRequest:
    """A POST that asks for a token: where to, and the body with its media type."""

    url: str
    media_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessToken:
    """A token that Redox gave. `obtained` and every `now` here are readings of a monotonic clock, in seconds.

    Monotonic, because the age of a token must not change when somebody sets the time.
    """

    value: str = field(repr=False)
    obtained: float
    lifetime: float
    refresh_token: str | None = field(default=None, repr=False)

    def remaining(self, now: float) -> float:
        """Seconds until the token ends; negative when it has."""
        return self.obtained + self.lifetime - now

    def needs_renewal(self, now: float) -> bool:
        """Whether the token ends within the margin."""
        return self.remaining(now) <= min(RENEWAL_MARGIN, self.lifetime / 2)

    def expired(self, now: float) -> bool:
        """Whether the token has ended."""
        return self.remaining(now) <= 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial:
    """A reply that gives no token. `error` and `description` are Redox's words, cleaned; None where it gave none.

    A `status` in the 200s means that the reply could not be read as a token.
    """

    status: int
    error: str | None = None
    description: str | None = None


def load_oauth_key(text: str | bytes, *, client_id: str, kid: str | None = None, scope: str | None = None) -> OAuthKey:
    """The key from PEM or JWK text. `kid` may be left out when a JWK names it.

    PEM from an environment variable may have its line ends written as backslash and n.
    Raises ConfigurationError saying what is wrong with it; never quotes it.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("ascii")
        except UnicodeDecodeError:
            raise ConfigurationError(f"the private key is neither PEM nor JWK (no ASCII text); {_MENDING}") from None
    text = text.strip()
    if not text:
        raise ConfigurationError(f"the private key is empty; {_MENDING}")
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
            f"Redox; make the key anew with alg {key.algorithm}, and register that one"
        )
    return key


def token_requests(
    key: ApiKey, base_url: str, *, held: AccessToken | None, now: datetime, jti: str
) -> tuple[TokenRequest, ...]:
    """What to ask, in this order, until one is granted. `now` is the wall clock, `jti` a name never used before.

    An OAuth key asks once: a fresh assertion, for these tokens can't be refreshed. A legacy key with a token `held`
    refreshes it first; a refresh token that another process has used already is denied, and then it authenticates.
    """
    if isinstance(key, OAuthKey):
        url = f"{base_url}/v2/auth/token"
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": _ASSERTION_TYPE,
            "client_assertion": build_assertion(key, url, now=now, jti=jti),
        }
        if key.scope is not None:
            form["scope"] = key.scope
        return (TokenRequest(url=url, media_type="application/x-www-form-urlencoded", body=urlencode(form).encode()),)
    authenticate = TokenRequest(
        url=f"{base_url}/auth/authenticate",
        media_type="application/json",
        body=json.dumps({"apiKey": key.api_key, "secret": key.secret}).encode(),
    )
    if held is None or held.refresh_token is None:
        return (authenticate,)
    refresh = TokenRequest(
        url=f"{base_url}/auth/refreshToken",
        media_type="application/json",
        body=json.dumps({"apiKey": key.api_key, "refreshToken": held.refresh_token}).encode(),
    )
    return refresh, authenticate


def build_assertion(key: OAuthKey, token_url: str, *, now: datetime, jti: str) -> str:
    """The signed client assertion (Redox: OAuth API keys; RFC 7523 3): iss = sub = client id, aud = the token URL."""
    issued = math.floor(now.timestamp())
    claims = {
        "iss": key.client_id,
        "sub": key.client_id,
        "aud": token_url,
        "iat": issued,
        "exp": issued + ASSERTION_SECONDS,
        "jti": jti,
    }
    return jwt.encode(claims, key.private_key, algorithm=key.algorithm, headers={"kid": key.kid, "typ": "JWT"})


def read_token_reply(key: ApiKey, status: int, body: bytes, *, sent: float, now: datetime) -> AccessToken | Denial:
    """What a token endpoint answered. `sent` is the monotonic clock when the request left; `now` the time of day.

    Redox's own clock (the Date of the reply) is the better `now`: a legacy reply says when its token `expires`.
    Never raises: a reply that can't be read is a Denial with its status.
    """
    if not 200 <= status < 300:
        return _read_denial(key, status, body)
    try:
        reply = msgspec.json.decode(body, type=dict[str, Any])
    except _UNREADABLE:
        return Denial(status=status)
    oauth = isinstance(key, OAuthKey)
    value = reply.get("access_token" if oauth else "accessToken")
    kind = reply.get("token_type", "bearer")
    if not isinstance(value, str) or not _BEARER.fullmatch(value) or str(kind).lower() != "bearer":
        return Denial(status=status)
    lifetime = _seconds(reply.get("expires_in")) if oauth else _until(reply.get("expires"), now)
    refresh_token = None if oauth else reply.get("refreshToken")
    return AccessToken(
        value=value,
        obtained=sent,
        lifetime=min(lifetime, LONGEST_TOKEN_SECONDS),
        refresh_token=refresh_token if isinstance(refresh_token, str) else None,
    )


def _check_private_key(key: object) -> None:
    if isinstance(key, RSAPrivateKey):
        if key.key_size < RSA_BITS:
            raise ConfigurationError(f"the RSA key has {key.key_size} bits, fewer than {RSA_BITS}; {_MENDING}")
    elif isinstance(key, EllipticCurvePrivateKey):
        if not isinstance(key.curve, SECP384R1):
            raise ConfigurationError(f"the elliptic-curve key is on {key.curve.name}, not on P-384; {_MENDING}")
    else:
        raise ConfigurationError(f"the private key is of a kind that Redox does not take; {_MENDING}")


def _from_pem(text: str) -> PrivateKey:
    if "\n" not in text:
        text = text.replace("\\n", "\n")
    if "-----BEGIN PUBLIC KEY-----" in text or "-----BEGIN CERTIFICATE-----" in text:
        raise ConfigurationError("that is the public half of a key; give the file that holds the private key")
    try:
        key = load_pem_private_key(text.encode("ascii", "replace"), password=None)
    except TypeError:  # how cryptography says that a password is missing
        raise ConfigurationError(
            "the private key is encrypted with a passphrase; write it out without one "
            "(openssl pkey -in KEY -out NEW) and protect the file instead"
        ) from None
    except Exception:  # noqa: BLE001 — its parsers raise several kinds, whose texts may quote the key
        raise ConfigurationError(f"the private key can't be read as PEM; {_MENDING}") from None
    _check_private_key(key)
    assert isinstance(key, PrivateKey)
    return key


def _jwk_members(text: str) -> dict[str, Any]:
    try:
        jwk = msgspec.json.decode(text, type=dict[str, Any])
    except _UNREADABLE:
        raise ConfigurationError("the private key looks like a JWK, but is not a valid JSON object") from None
    if "keys" in jwk:
        raise ConfigurationError("that is a set of keys (JWKS); give the one private key out of it as a JWK")
    if jwk.get("kty") not in ("RSA", "EC"):
        raise ConfigurationError(f"the JWK's kty is neither RSA nor EC; {_MENDING}")
    if "d" not in jwk:
        raise ConfigurationError("that JWK is the public half of a key (it has no member d); give the private one")
    return jwk


def _from_jwk(jwk: Mapping[str, Any]) -> PrivateKey:
    try:
        key = RSAAlgorithm.from_jwk(dict(jwk)) if jwk["kty"] == "RSA" else ECAlgorithm.from_jwk(dict(jwk))
    except Exception:  # noqa: BLE001 — members of any type reach arithmetic here; the texts may quote the key
        raise ConfigurationError(f"the JWK's members do not make a key; {_MENDING}") from None
    _check_private_key(key)
    assert isinstance(key, PrivateKey)
    return key


def _read_denial(key: ApiKey, status: int, body: bytes) -> Denial:
    # A legacy denial is plain text of nobody-knows-what (Redox: 401 bodies are plain text): the status says enough.
    if isinstance(key, LegacyKey):
        return Denial(status=status)
    try:
        reply = msgspec.json.decode(body, type=dict[str, Any])
    except _UNREADABLE:
        return Denial(status=status)
    return Denial(status=status, error=_words(reply.get("error")), description=_words(reply.get("error_description")))


def _words(text: object) -> str | None:
    """The text fit for a log: printable, short, and withheld when it may quote an assertion or a token."""
    if not isinstance(text, str) or not text:
        return None
    if "eyJ" in text or max(map(len, text.split()), default=0) > 80:
        return "(withheld: it may quote a secret)"
    return "".join(c if " " <= c <= "~" else "?" for c in text[:200])


def _seconds(expires_in: object) -> float:
    if isinstance(expires_in, int | float) and not isinstance(expires_in, bool) and 0 < expires_in < math.inf:
        return float(min(expires_in, LONGEST_TOKEN_SECONDS))  # an int may be larger than any float
    return TOKEN_SECONDS


def _until(expires: object, now: datetime) -> float:
    if not isinstance(expires, str):
        return TOKEN_SECONDS
    try:
        end = datetime.fromisoformat(expires)
    except ValueError:
        return TOKEN_SECONDS
    return max(0.0, ((end if end.tzinfo else end.replace(tzinfo=UTC)) - now).total_seconds())
