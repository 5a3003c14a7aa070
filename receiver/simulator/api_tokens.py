"""Tokens of the simulated Redox API: OAuth with client assertions, and legacy API keys with refresh tokens.

Checks what Redox is documented to check, and answers with Redox's documented texts. Where Redox documents no text for a
rejection (signature, aud, iat, exp, jti), the text is this module's own.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import jwt

from receiver.simulator.api_exchange import Received, SimulatedApiAnswer

_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ALGORITHMS: Final = ("RS384", "ES384")
_IAT_WINDOW: Final = 300  # Redox: iat within the last 5 minutes
_SKEW: Final = 10  # Redox: 10 s of skew allowed

JWKS = Mapping[str, Any]


class ApiTokenSettings(Protocol):
    """What the API tells its tokens. Read for each request, because tests change it."""

    base_url: str
    now: Callable[[], datetime]
    token_seconds: float


@dataclass(slots=True)
class TokenGrant:
    """What a token grants, and until when."""

    legacy: bool
    ends: datetime
    refused: bool = False


class ApiTokens:
    """The registered API keys, and the tokens issued for them. Thread-safe."""

    def __init__(self, settings: ApiTokenSettings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._oauth: dict[str, Callable[[], JWKS]] = {}
        self._legacy: dict[str, str] = {}
        self._grants: dict[str, TokenGrant] = {}
        self._refresh_tokens: dict[str, str] = {}
        self._jtis: set[str] = set()

    @property
    def oauth_clients(self) -> int:
        """The number of registered OAuth keys."""
        return len(self._oauth)

    def register_oauth(self, client_id: str, jwks: JWKS | Callable[[], JWKS]) -> None:
        """Register an OAuth key: its public keys, or a function that returns them."""
        self._oauth[client_id] = jwks if callable(jwks) else lambda: jwks

    def register_legacy(self, api_key: str, secret: str) -> None:
        """Register a legacy API key."""
        self._legacy[api_key] = secret

    def refuse_all(self) -> None:
        """Reject every token issued so far."""
        with self._lock:
            for grant in self._grants.values():
                grant.refused = True

    def forget_refresh_tokens(self) -> None:
        """Invalidate all refresh tokens."""
        with self._lock:
            self._refresh_tokens.clear()

    def answer(self, request: Received, path: str) -> SimulatedApiAnswer | None:
        """Return the response of a token endpoint, or None if there is none at `path`."""
        if request.method == "POST" and path == "/v2/auth/token":
            return self._oauth_token(request)
        if request.method == "POST" and path == "/auth/authenticate":
            return self._authenticate(request)
        if request.method == "POST" and path == "/auth/refreshToken":
            return self._refresh(request)
        return None

    def _oauth_token(self, request: Received) -> SimulatedApiAnswer:
        if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return _denied("x-www-form-urlencoded content-type required")
        form = request.form()
        if "grant_type" not in form:
            return _denied("Missing grant_type parameter")
        if form["grant_type"] != "client_credentials":
            return _denied("grant_type must be client_credentials", error="unsupported_grant_type")
        if form.get("client_assertion_type") != _ASSERTION_TYPE or not form.get("client_assertion"):
            return _denied("Missing client assertion")
        denial = self._judge_assertion(form["client_assertion"])
        if denial is not None:
            return denial
        reply = {
            "access_token": self._issue(legacy=False),
            "token_type": "Bearer",
            "expires_in": self._settings.token_seconds,
        }
        if "scope" in form:
            reply["scope"] = form["scope"]
        return SimulatedApiAnswer(body=reply)

    def _judge_assertion(self, assertion: str) -> SimulatedApiAnswer | None:
        try:
            header = jwt.get_unverified_header(assertion)
            claimed = jwt.decode(assertion, options={"verify_signature": False})
        except jwt.InvalidTokenError:
            return _denied("the client assertion is not a valid JWT", error="invalid_client")
        if header.get("alg") not in _ALGORITHMS:
            return _denied("alg must be RS384 or ES384", error="invalid_client")
        if not isinstance(header.get("kid"), str):
            return _denied("JWT header kid property is required")
        known = self._oauth.get(str(claimed.get("iss")))
        keys = {key.get("kid"): key for key in known()["keys"]} if known else {}
        if header["kid"] not in keys:
            return _denied("Public key not found, check client_id, kid and Redox dashboard settings")
        try:
            # Only the signature and the names are checked here. Times are checked below, by this server's own clock.
            key = jwt.PyJWK(dict(keys[header["kid"]]), header["alg"])
            jwt.decode(
                assertion,
                key,
                algorithms=_ALGORITHMS,
                audience=f"{self._settings.base_url}/v2/auth/token",
                issuer=str(claimed["iss"]),
                subject=str(claimed["iss"]),
                options={
                    "require": ["iss", "sub", "aud", "iat", "exp", "jti"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, jwt.PyJWKError) as exc:
            return _denied(f"the client assertion is not valid ({type(exc).__name__})", error="invalid_client")
        now = self._settings.now().timestamp()
        if not isinstance(claimed["iat"], int | float) or not isinstance(claimed["exp"], int | float):
            return _denied("iat and exp must be numbers", error="invalid_client")
        if not now - _IAT_WINDOW - _SKEW <= claimed["iat"] <= now + _SKEW:
            return _denied("iat is not within the last 5 minutes", error="invalid_client")
        if not now - _SKEW <= claimed["exp"] <= claimed["iat"] + _IAT_WINDOW:
            return _denied("exp is past, or more than 300 s after iat", error="invalid_client")
        with self._lock:
            if claimed["jti"] in self._jtis:
                return _denied("jti was already used", error="invalid_client")
            self._jtis.add(claimed["jti"])
        return None

    def _authenticate(self, request: Received) -> SimulatedApiAnswer:
        asked = request.json_object()
        api_key = str(asked.get("apiKey"))
        secret = self._legacy.get(api_key)
        if secret is None or not secrets.compare_digest(secret.encode(), str(asked.get("secret")).encode()):
            return SimulatedApiAnswer(status=401, body="Invalid API key or secret")
        return self._legacy_reply(api_key)

    def _refresh(self, request: Received) -> SimulatedApiAnswer:
        asked = request.json_object()
        with self._lock:
            owner = self._refresh_tokens.pop(str(asked.get("refreshToken")), None)
        if owner is None or owner != asked.get("apiKey"):
            return SimulatedApiAnswer(status=401, body="Invalid refresh token")
        return self._legacy_reply(owner)

    def _legacy_reply(self, api_key: str) -> SimulatedApiAnswer:
        refresh_token = secrets.token_urlsafe(16)
        with self._lock:
            self._refresh_tokens[refresh_token] = api_key
        expires = (self._settings.now() + timedelta(seconds=self._settings.token_seconds)).isoformat(
            timespec="milliseconds"
        )
        return SimulatedApiAnswer(
            body={
                "accessToken": self._issue(legacy=True),
                "expires": expires.replace("+00:00", "Z"),
                "refreshToken": refresh_token,
            }
        )

    def _issue(self, *, legacy: bool) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._grants[token] = TokenGrant(
                legacy=legacy, ends=self._settings.now() + timedelta(seconds=self._settings.token_seconds)
            )
        return token

    def grant_of(self, request: Received) -> TokenGrant | None:
        """Return the grant of the request's token, or None if the token is not valid."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        with self._lock:
            grant = self._grants.get(token) if scheme.lower() == "bearer" else None
            return grant if grant and not grant.refused and self._settings.now() < grant.ends else None


def _denied(description: str, *, error: str = "invalid_request") -> SimulatedApiAnswer:
    """RFC 6749 5.2: invalid_client is a 401; the other errors are a 400."""
    return SimulatedApiAnswer(
        status=401 if error == "invalid_client" else 400,
        body={
            "error": error,
            "error_description": description,
            "error_uri": "https://www.rfc-editor.org/rfc/rfc6749#section-5.2",
        },
    )
