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
# Redox: an OAuth token is valid for 5 minutes. Assumed if a reply has no valid lifetime.
TOKEN_SECONDS: Final = 300.0
# Redox documents no token with a lifetime of more than a day. A longer lifetime in a reply comes from a wrong clock,
# and is reduced to this.
LONGEST_TOKEN_SECONDS: Final = 86_400.0
# Seconds before its end at which a token is renewed, so that it does not expire in transit: longer than a slow
# connection takes, and a tenth of the documented lifetime. At most half of a shorter lifetime.
RENEWAL_MARGIN: Final = 30.0
_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
# RFC 6750 2.1: the characters of a bearer token. Others could break the header.
_BEARER: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*")
# msgspec's errors for bytes that are not JSON. For text that is not UTF-8 it raises no DecodeError.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRequest:
    """A POST that requests a token: its URL, and its body with the media type."""

    url: str
    media_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessToken:
    """A token that Redox issued. `obtained` and every `now` of its methods are seconds of a monotonic clock.

    Monotonic, because the age of a token must not change when the system clock is set.
    """

    value: str = field(repr=False)
    obtained: float
    lifetime: float
    refresh_token: str | None = field(default=None, repr=False)

    def remaining(self, now: float) -> float:
        """Return the seconds until the token expires; negative if it has."""
        return self.obtained + self.lifetime - now

    def needs_renewal(self, now: float) -> bool:
        """Return whether the token expires within the margin."""
        return self.remaining(now) <= min(RENEWAL_MARGIN, self.lifetime / 2)

    def expired(self, now: float) -> bool:
        """Return whether the token has expired."""
        return self.remaining(now) <= 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial:
    """A reply without a token. `error` and `description`: Redox's words, cleaned, or None.

    A `status` in the 200s means that the reply has no valid token.
    """

    status: int
    error: str | None = None
    description: str | None = None


def token_requests(
    key: ApiKey, base_url: str, *, held: AccessToken | None, now: datetime, jti: str
) -> tuple[TokenRequest, ...]:
    """Return the requests to send, in this order, until one is granted. `now`: the wall clock. `jti`: a unique name.

    For an OAuth key: one request with a new assertion, because its tokens cannot be refreshed. For a legacy key with a
    token `held`: a refresh, then an authentication, because a refresh token that another process has used is denied.
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
    """Return the signed client assertion (Redox: OAuth API keys; RFC 7523). iss, sub: client id; aud: token URL."""
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
    """Read the reply of a token endpoint. `sent`: the monotonic clock when the request was sent. `now`: the time of
    day.

    Redox's clock (the reply's Date header) is the better `now`: a legacy reply has the time at which its token expires.
    Raises no error: an unreadable reply is a Denial with its status.
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
    # A legacy denial is plain text without a documented format (Redox: 401 bodies are plain text).
    if isinstance(key, LegacyKey):
        return Denial(status=status)
    try:
        reply = msgspec.json.decode(body, type=dict[str, Any])
    except _UNREADABLE:
        return Denial(status=status)
    return Denial(status=status, error=_words(reply.get("error")), description=_words(reply.get("error_description")))


def _words(text: object) -> str | None:
    """Return the text for a log: printable and short. A text that may quote an assertion or a token is withheld."""
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
