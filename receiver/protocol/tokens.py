"""The token endpoint (RFC 6749, client credentials): returns a token for a request, or one of the RFC's errors.

Redox is the client: it requests a token with the credentials from its dashboard, and presents the token with each
message. It authenticates with a secret (RFC 6749 2.3.1: Basic, or in the body) or a signed assertion (RFC 7523 2.2).

Must not keep state: the caller checks the nonce in `Granted` against reuse before it returns the token, and counts
wrong secrets.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, unquote_plus

import msgspec

from receiver.errors import Unavailable, Unreadable, Unverified
from receiver.protocol import jose
from receiver.protocol.json_limits import check_depth, check_encoding
from receiver.protocol.message import Head, Inbound, Nonce
from receiver.protocol.registry import Destination, live
from receiver.protocol.scanning import members
from receiver.protocol.verification import oauth
from receiver.protocol.verification.oauth import Client, OAuthCredential
from receiver.protocol.verification.smart import SmartCredential

# A token request has some hundred bytes, one with an assertion less than three thousand.
MAX_REQUEST: Final = 16 * 1024
ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_MAX_PARAMETERS: Final = 50

# Every reason with which the token endpoint denies a token, and its meaning for an operator. An assertion may also be
# denied with a reason of `public_keys.TOKEN_REASONS`.
DENIAL_REASONS: Final[dict[str, str]] = {
    "token_secret_wrong": "the client id or the client secret is wrong",
    "token_credential_expired": "the client's credential has expired or was revoked: add another and set it in Redox",
    "token_client_unproved": "the request has neither a client secret nor a client assertion of a registered client",
    "token_client_unknown": "the destination has no client of kind smart",
    "token_client_differs": "the assertion's subject, or the client id, is not the credential's client id",
    "token_assertion_type_wrong": "client_assertion_type is not jwt-bearer",
    "token_jti_missing": "the assertion has no jti",
    "token_assertion_replayed": "the assertion was used before",
    "token_basic_malformed": "the Basic authorization is malformed",
    "token_two_methods": "the request has more than one authentication method",
    "token_grant_type_wrong": "the grant_type is not the credential's (--grant-type)",
    "token_audience_wrong": "the requested audience is not the credential's (--audience)",
    "token_scope_wrong": "a requested scope is not one of the credential's (--scope)",
    "token_media_type_wrong": "the request is neither a form nor JSON",
    "token_parameter_twice": "a parameter comes twice",
    "token_request_malformed": "the form or JSON is malformed",
    "token_request_too_large": "the request is too large",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Granted:
    """An access token and the other values of the answer. `once`: an assertion's nonce, which must not be reused."""

    credential: int
    kind: str
    access_token: str = field(repr=False)
    expires_in: int
    scope: str
    once: Nonce | None = None

    def body(self) -> dict[str, Any]:
        """RFC 6749 5.1."""
        body = {"access_token": self.access_token, "token_type": "Bearer", "expires_in": self.expires_in}
        return body | ({"scope": self.scope} if self.scope else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Denied:
    """No token. `error`: the RFC's error code, for the client. `reason`: for the audit log only.

    `credential`: the client that authenticated, if it did.
    """

    error: str
    reason: str
    credential: int | None = None

    @property
    def status(self) -> int:
        """RFC 6749 5.2."""
        return 401 if self.error == "invalid_client" else 400

    @property
    def guess(self) -> bool:
        """Whether it may have been an attempt to guess a secret."""
        return self.error == "invalid_client"


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClientRequest:
    """A token request. `basic`: id and secret of a Basic header, decoded in each way that clients encode it."""

    parameters: Mapping[str, str] = field(repr=False)
    basic: tuple[tuple[str, str], ...] | None = field(repr=False)

    def value(self, parameter: str, client: Client) -> str | None:
        """Return a parameter, by the name under which this client sends it; None if it is missing or empty."""
        return self.parameters.get(client.names.get(parameter, parameter)) or None


class _TokenRefused(Exception):
    """One of the RFC's errors."""

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(reason)
        self.error, self.reason = error, reason


def decide(inbound: Inbound, destination: Destination, now: datetime, *, jti: str) -> Granted | Denied:
    """Return the answer to a request for a token of `destination`. `jti`: a unique name for the token.

    The reasons are `token_*`, and with an assertion also those of `jose.verify`. Raises Unavailable if the client's
    keys are stale.
    """
    credential: OAuthCredential | SmartCredential | None = None
    try:
        request = _ClientRequest(parameters=_parameters(inbound), basic=_basic(inbound.head))
        credential, once = _authenticate(request, destination, now)
        client = credential.client
        if request.value("grant_type", client) != client.grant_type:
            raise _TokenRefused("unsupported_grant_type", "token_grant_type_wrong")
        audience = request.value("audience", client)
        if None not in (client.audience, audience) and audience != client.audience:
            raise _TokenRefused("invalid_target", "token_audience_wrong")  # RFC 8707 2
        scopes = _scopes(request.value("scope", client), client)
    except _TokenRefused as exc:
        return Denied(error=exc.error, reason=exc.reason, credential=None if credential is None else credential.id)
    return Granted(
        credential=credential.id,
        kind=credential.kind,
        access_token=oauth.issue(credential, destination, now, scopes=scopes, jti=jti),
        expires_in=client.lifetime,
        scope=" ".join(scopes),
        once=once,
    )


def _authenticate(
    request: _ClientRequest, destination: Destination, now: datetime
) -> tuple[OAuthCredential | SmartCredential, Nonce | None]:
    clients = [each for each in destination.credentials if isinstance(each, OAuthCredential | SmartCredential)]
    secrets = any(request.value("client_secret", each.client) for each in clients)
    assertions = any(request.value("client_assertion", each.client) for each in clients)
    # RFC 6749 2.3: at most one method in each request.
    if (request.basic is not None) + secrets + assertions > 1:
        raise _TokenRefused("invalid_request", "token_two_methods")
    if assertions:
        return _by_assertion(request, _kind(clients, SmartCredential), now)
    if request.basic is not None or secrets:
        return _by_secret(request, _kind(clients, OAuthCredential), now), None
    raise _TokenRefused("invalid_client", "token_client_unproved")


def _by_secret(request: _ClientRequest, clients: Sequence[OAuthCredential], now: datetime) -> OAuthCredential:
    found: OAuthCredential | None = None
    for each in clients:
        for name, secret in _pairs(request, each.client):
            digest = hmac.digest(each.key, secret.encode("utf-8", "surrogatepass"), "sha256")
            # All are compared, names in constant time too: the time does not depend on the secret.
            same = hmac.compare_digest(name.encode("utf-8", "surrogatepass"), each.client.client_id.encode())
            if hmac.compare_digest(digest, each.digest) & same and (found is None or live(each, now)):
                found = each
    if found is None:
        raise _TokenRefused("invalid_client", "token_secret_wrong")
    if not live(found, now):
        raise _TokenRefused("invalid_client", "token_credential_expired")
    return found


def _pairs(request: _ClientRequest, client: Client) -> Iterable[tuple[str, str]]:
    """Return the possible pairs of client id and secret in the request."""
    name = request.value("client_id", client)
    if request.basic is None:
        secret = request.value("client_secret", client)
        return ((name, secret),) if name is not None and secret is not None else ()
    # The id may be in the body too; then both must be the same.
    return [pair for pair in request.basic if name in (None, pair[0])]


def _by_assertion(
    request: _ClientRequest, clients: Sequence[SmartCredential], now: datetime
) -> tuple[SmartCredential, Nonce]:
    reasons = []
    stale: Unavailable | None = None
    for each in clients:
        if not live(each, now):
            reasons.append("token_credential_expired")
            continue
        try:
            return each, _verify_assertion(request, each, now)
        except Unverified as exc:
            reasons.append(exc.reason)
        except Unavailable as exc:
            stale = exc
    if stale is not None:
        raise stale
    # The last client's reason: there is rarely more than one.
    raise _TokenRefused("invalid_client", reasons[-1] if reasons else "token_client_unknown")


def _verify_assertion(request: _ClientRequest, credential: SmartCredential, now: datetime) -> Nonce:
    """Verify an assertion. RFC 7523 3: iss and sub are the client, aud is this endpoint, jti is unique."""
    client = credential.client
    if request.value("client_assertion_type", client) != ASSERTION_TYPE:
        raise Unverified("token_assertion_type_wrong")
    token = (request.value("client_assertion", client) or "").encode("utf-8", "replace")
    claims = jose.verify(token, credential.rules, now)
    if claims.get("sub") != client.client_id or request.value("client_id", client) not in (None, client.client_id):
        raise Unverified("token_client_differs")
    jti = claims.get("jti")
    if not isinstance(jti, str) or not jti:
        raise Unverified("token_jti_missing")
    until = datetime.fromtimestamp(claims["exp"], UTC) + timedelta(seconds=credential.rules.leeway + 1)
    return Nonce.of(f"jti {client.client_id}", jti.encode("utf-8", "surrogatepass"), until)


def _scopes(requested: str | None, client: Client) -> tuple[str, ...]:
    if requested is None:
        return client.scopes
    scopes = tuple(requested.split(" "))
    if not set(scopes) <= set(client.scopes):
        raise _TokenRefused("invalid_scope", "token_scope_wrong")
    return scopes


def _parameters(inbound: Inbound) -> dict[str, str]:
    """Return the parameters of a form or a JSON object, each at most once (RFC 6749 3.2)."""
    media = inbound.head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if len(inbound.body) > MAX_REQUEST:
        raise _TokenRefused("invalid_request", "token_request_too_large")
    if media == "application/json":
        return _json(inbound.body)
    if media == "application/x-www-form-urlencoded":
        return _form(inbound.body)
    raise _TokenRefused("invalid_request", "token_media_type_wrong")


def _form(body: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS, errors="strict")
    except ValueError:
        raise _TokenRefused("invalid_request", "token_request_malformed") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise _TokenRefused("invalid_request", "token_parameter_twice")
    return parameters


def _json(body: bytes) -> dict[str, str]:
    try:
        check_encoding(body)
        check_depth(body)
        members(body, where="token", wanted=())
        parameters = msgspec.json.decode(body, type=dict[str, Any])
    except (Unreadable, msgspec.DecodeError):
        raise _TokenRefused("invalid_request", "token_request_malformed") from None
    return {name: value for name, value in parameters.items() if isinstance(value, str)}


def _basic(head: Head) -> tuple[tuple[str, str], ...] | None:
    """Return id and secret of `Authorization: Basic`, decoded in two ways; None if there is no such header.

    RFC 6749 2.3.1 encodes them as in a form before base64; many clients don't.
    """
    scheme, _, value = (head.header("authorization") or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        text = b64decode(value.strip(b" "), validate=True).decode()
        name, colon, secret = text.partition(":")
        decoded = unquote_plus(name, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, ValueError):
        raise _TokenRefused("invalid_client", "token_basic_malformed") from None
    if not colon:
        raise _TokenRefused("invalid_client", "token_basic_malformed")
    return tuple(dict.fromkeys([(name, secret), decoded]))


_TokenClient = TypeVar("_TokenClient", OAuthCredential, SmartCredential)


def _kind(clients: Iterable[OAuthCredential | SmartCredential], kind: type[_TokenClient]) -> list[_TokenClient]:
    return [each for each in clients if isinstance(each, kind)]
