"""Our token endpoint (RFC 6749, client credentials): a request comes in, a token or one of the RFC's errors goes out.

Redox is the client: it asks here with what was typed into its dashboard, and presents the token with each message. A
client proves itself by its secret (RFC 6749 2.3.1: Basic, or in the body) or by a signed assertion (RFC 7523 2.2).

May not remember anything: whether an assertion was used before is decided by whoever keeps `Granted.once`, before the
token is handed out. May not count: a wrong secret costs the sender nothing here.
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
from receiver.protocol.message import Head, Inbound, Nonce
from receiver.protocol.registry import Destination, live
from receiver.protocol.scanning import check_depth, check_encoding, members
from receiver.protocol.verification import oauth
from receiver.protocol.verification.oauth import Client, OAuthCredential
from receiver.protocol.verification.smart import SmartCredential

# A token request has some hundred bytes, one with an assertion under three thousand.
MAX_REQUEST: Final = 16 * 1024
ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_MAX_PARAMETERS: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Granted:
    """An access token, and what the endpoint answers with it. `once`: an assertion that may not be used again."""

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
    """No token. `error` is the RFC's word, for the client; `reason` is for the audit alone.

    `credential`: who proved itself all the same.
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
        """Whether it may have been a guess at a secret."""
        return self.error == "invalid_client"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A request as it was sent. `basic`: what a Basic header held, in each way that clients encode it."""

    parameters: Mapping[str, str] = field(repr=False)
    basic: tuple[tuple[str, str], ...] | None = field(repr=False)

    def value(self, parameter: str, client: Client) -> str | None:
        """A parameter, by the name under which this client sends it; None when it is missing or empty."""
        return self.parameters.get(client.names.get(parameter, parameter)) or None


class _Refused(Exception):
    """One of the RFC's errors."""

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(reason)
        self.error, self.reason = error, reason


def decide(inbound: Inbound, destination: Destination, now: datetime, *, jti: str) -> Granted | Denied:
    """What the endpoint answers to a request for a token for `destination`. `jti`: the token's name, never used before.

    The reasons are `token_*`, and with an assertion also those of `jose.prove`, which raises Unavailable where the
    client's keys are stale.
    """
    credential: OAuthCredential | SmartCredential | None = None
    try:
        asked = _Asked(parameters=_parameters(inbound), basic=_basic(inbound.head))
        credential, once = _authenticate(asked, destination, now)
        client = credential.client
        if asked.value("grant_type", client) != client.grant_type:
            raise _Refused("unsupported_grant_type", "token_grant_type_wrong")
        audience = asked.value("audience", client)
        if None not in (client.audience, audience) and audience != client.audience:
            raise _Refused("invalid_target", "token_audience_wrong")  # RFC 8707 2
        scopes = _scopes(asked.value("scope", client), client)
    except _Refused as exc:
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
    asked: _Asked, destination: Destination, now: datetime
) -> tuple[OAuthCredential | SmartCredential, Nonce | None]:
    clients = [each for each in destination.credentials if isinstance(each, OAuthCredential | SmartCredential)]
    secrets = any(asked.value("client_secret", each.client) for each in clients)
    assertions = any(asked.value("client_assertion", each.client) for each in clients)
    # RFC 6749 2.3: not more than one method in each request.
    if (asked.basic is not None) + secrets + assertions > 1:
        raise _Refused("invalid_request", "token_two_methods")
    if assertions:
        return _by_assertion(asked, _kind(clients, SmartCredential), now)
    if asked.basic is not None or secrets:
        return _by_secret(asked, _kind(clients, OAuthCredential), now), None
    raise _Refused("invalid_client", "token_client_unproved")


def _by_secret(asked: _Asked, clients: Sequence[OAuthCredential], now: datetime) -> OAuthCredential:
    found: OAuthCredential | None = None
    for each in clients:
        for name, secret in _pairs(asked, each.client):
            digest = hmac.digest(each.key, secret.encode("utf-8", "surrogatepass"), "sha256")
            # No early end, and the name in constant time too: the time taken tells nothing.
            same = hmac.compare_digest(name.encode("utf-8", "surrogatepass"), each.client.client_id.encode())
            if hmac.compare_digest(digest, each.digest) & same and (found is None or live(each, now)):
                found = each
    if found is None:
        raise _Refused("invalid_client", "token_secret_wrong")
    if not live(found, now):
        raise _Refused("invalid_client", "token_credential_expired")
    return found


def _pairs(asked: _Asked, client: Client) -> Iterable[tuple[str, str]]:
    """The client ids and secrets that the request may mean."""
    name = asked.value("client_id", client)
    if asked.basic is None:
        secret = asked.value("client_secret", client)
        return ((name, secret),) if name is not None and secret is not None else ()
    # The id may stand in the body as well; then it is the same.
    return [pair for pair in asked.basic if name in (None, pair[0])]


def _by_assertion(asked: _Asked, clients: Sequence[SmartCredential], now: datetime) -> tuple[SmartCredential, Nonce]:
    reasons = []
    stale: Unavailable | None = None
    for each in clients:
        if not live(each, now):
            reasons.append("token_credential_expired")
            continue
        try:
            return each, _prove(asked, each, now)
        except Unverified as exc:
            reasons.append(exc.reason)
        except Unavailable as exc:
            stale = exc
    if stale is not None:
        raise stale
    # The reason of the one that the assertion came furthest with would be better; mostly there is one.
    raise _Refused("invalid_client", reasons[-1] if reasons else "token_client_unknown")


def _prove(asked: _Asked, credential: SmartCredential, now: datetime) -> Nonce:
    """RFC 7523 3: iss and sub are the client, aud is this endpoint; jti names this assertion alone."""
    client = credential.client
    if asked.value("client_assertion_type", client) != ASSERTION_TYPE:
        raise Unverified("token_assertion_type_wrong")
    token = (asked.value("client_assertion", client) or "").encode("utf-8", "replace")
    claims = jose.prove(token, credential.rules, now)
    if claims.get("sub") != client.client_id or asked.value("client_id", client) not in (None, client.client_id):
        raise Unverified("token_client_differs")
    jti = claims.get("jti")
    if not isinstance(jti, str) or not jti:
        raise Unverified("token_jti_missing")
    until = datetime.fromtimestamp(claims["exp"], UTC) + timedelta(seconds=credential.rules.leeway + 1)
    return Nonce.of(f"jti {client.client_id}", jti.encode("utf-8", "surrogatepass"), until)


def _scopes(asked: str | None, client: Client) -> tuple[str, ...]:
    if asked is None:
        return client.scopes
    scopes = tuple(asked.split(" "))
    if not set(scopes) <= set(client.scopes):
        raise _Refused("invalid_scope", "token_scope_wrong")
    return scopes


def _parameters(inbound: Inbound) -> dict[str, str]:
    """The parameters of a form, or of a JSON object; each once (RFC 6749 3.2)."""
    media = inbound.head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if len(inbound.body) > MAX_REQUEST:
        raise _Refused("invalid_request", "token_request_too_large")
    if media == "application/json":
        return _json(inbound.body)
    if media == "application/x-www-form-urlencoded":
        return _form(inbound.body)
    raise _Refused("invalid_request", "token_media_type_wrong")


def _form(body: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS, errors="strict")
    except ValueError:
        raise _Refused("invalid_request", "token_request_malformed") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise _Refused("invalid_request", "token_parameter_twice")
    return parameters


def _json(body: bytes) -> dict[str, str]:
    try:
        check_encoding(body)
        check_depth(body)
        members(body, where="token", wanted=())
        parameters = msgspec.json.decode(body, type=dict[str, Any])
    except (Unreadable, msgspec.DecodeError):
        raise _Refused("invalid_request", "token_request_malformed") from None
    return {name: value for name, value in parameters.items() if isinstance(value, str)}


def _basic(head: Head) -> tuple[tuple[str, str], ...] | None:
    """Id and secret out of `Authorization: Basic`; None when there is none.

    RFC 6749 2.3.1 encodes them as in a form before base64; many clients don't. Both are tried.
    """
    scheme, _, value = (head.header("authorization") or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        text = b64decode(value.strip(b" "), validate=True).decode()
        name, colon, secret = text.partition(":")
        decoded = unquote_plus(name, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, ValueError):
        raise _Refused("invalid_client", "token_basic_malformed") from None
    if not colon:
        raise _Refused("invalid_client", "token_basic_malformed")
    return tuple(dict.fromkeys([(name, secret), decoded]))


_Kind = TypeVar("_Kind", OAuthCredential, SmartCredential)


def _kind(clients: Iterable[OAuthCredential | SmartCredential], kind: type[_Kind]) -> list[_Kind]:
    return [each for each in clients if isinstance(each, kind)]
