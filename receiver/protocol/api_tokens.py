"""Access tokens of Redox: the requests for one, and the replies.

Must not send anything, look at a clock, or generate anything random: text, `now` and `jti` are arguments.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

import jwt
import msgspec

from receiver.protocol.api_keys import ApiKey, LegacyKey, OAuthKey

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
_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
# RFC 6750 2.1: what a bearer token may consist of. Anything else could break the header it is put into.
_BEARER: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*")
# What msgspec raises for bytes that are not JSON: for text that is not UTF-8 it raises no DecodeError.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


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
