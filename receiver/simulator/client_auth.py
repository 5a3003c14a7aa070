"""Authenticators of the simulated Redox: each authentication strategy that Redox's dashboard offers.

They are used in addition to the verification token, or instead of it. Written from the RFCs and AWS's documentation,
independent of the receiver's verifiers, so that each side tests the other. Must not import the verifiers. Threads may
share an authenticator.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol
from urllib.parse import quote, quote_plus, unquote, urlencode, urlsplit
from uuid import uuid4

import jwt

from receiver.errors import ConfigurationError
from receiver.simulator.http_connection import HttpConnection
from receiver.simulator.signer import Signer

_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
# Seconds before its end at which a token is renewed.
_MARGIN: Final = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OutgoingRequest:
    """The signed parts of an outgoing request. `host`: as in the Host header. `target`: with the query."""

    method: str
    host: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class Authenticator(Protocol):
    """Returns the headers that authenticate a request, with lower-case names. `now`: seconds since 1970."""

    def headers(self, request: OutgoingRequest, *, now: float) -> dict[str, str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HmacAuthenticator:
    """Signs with the webhook signing secret."""

    signer: Signer

    def headers(self, request: OutgoingRequest, *, now: float) -> dict[str, str]:
        """Return the signature header and the timestamp header."""
        return {name.lower(): value for name, value in self.signer.headers(request.body, now=now).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedTokenAuthenticator:
    """Sends a new JWT with each request (kinds jwt and google). `key`: a private key in PEM."""

    key: str = field(repr=False)
    algorithm: str
    issuer: str
    audience: str
    kid: str | None = None
    subject: str | None = None
    email: str | None = None
    lifetime: int = 300

    def token(self, *, now: float) -> str:
        """Make a new token."""
        claims = {
            "iss": self.issuer,
            "aud": self.audience,
            "sub": self.subject,
            "iat": int(now),
            "exp": int(now) + self.lifetime,
            "jti": str(uuid4()),
            "email": self.email,
            "email_verified": None if self.email is None else True,
        }
        headers = None if self.kid is None else {"kid": self.kid}
        return jwt.encode(
            {name: value for name, value in claims.items() if value is not None},
            self.key,
            algorithm=self.algorithm,
            headers=headers,
        )

    def headers(self, _: OutgoingRequest, *, now: float) -> dict[str, str]:
        """Return the token as a Bearer header."""
        return {"authorization": f"Bearer {self.token(now=now)}"}


class AccessTokenAuthenticator:
    """Sends an access token from the token endpoint (kinds oauth and smart), which it keeps until it expires.

    If `assertion` is None, the client authenticates with `secret`, which it sends as `send` specifies. `names`: other
    names for the parameters.
    """

    def __init__(
        self,
        token_url: str,
        client_id: str,
        *,
        secret: str | None = None,
        assertion: SignedTokenAuthenticator | None = None,
        send: Literal["basic", "form", "json"] = "basic",
        names: Mapping[str, str] | None = None,
        audience: str | None = None,
        scope: str | None = None,
    ) -> None:
        self._url, self._client_id, self._secret, self._assertion = token_url, client_id, secret, assertion
        self._send, self._names, self._audience, self._scope = send, names or {}, audience, scope
        self._lock = threading.Lock()
        self._token, self._until = "", 0.0

    def headers(self, _: OutgoingRequest, *, now: float) -> dict[str, str]:
        """Return the token as a Bearer header. Renews it shortly before it expires. Raises ConfigurationError if none
        is issued.
        """
        with self._lock:
            if time.monotonic() >= self._until:
                self._token, lifetime = self.ask(now=now)
                self._until = time.monotonic() + max(lifetime - _MARGIN, lifetime / 2)
            return {"authorization": f"Bearer {self._token}"}

    def ask(self, *, now: float) -> tuple[str, float]:
        """Request a new token. Returns it and its lifetime in seconds. Raises ConfigurationError."""
        parameters = {"grant_type": "client_credentials", "audience": self._audience, "scope": self._scope}
        headers: dict[str, str] = {}
        if self._assertion is not None:
            parameters |= {"client_assertion_type": _ASSERTION_TYPE, "client_assertion": self._assertion.token(now=now)}
        elif self._send == "basic":  # RFC 6749 2.3.1
            pair = f"{quote_plus(self._client_id)}:{quote_plus(self._secret or '')}"
            headers["authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        else:
            parameters |= {"client_id": self._client_id, "client_secret": self._secret}
        table = {self._names.get(name, name): value for name, value in parameters.items() if value is not None}
        if self._send == "json":
            headers["content-type"], body = "application/json", json.dumps(table).encode()
        else:
            headers["content-type"], body = "application/x-www-form-urlencoded", urlencode(table).encode()
        url = urlsplit(self._url)
        with HttpConnection(f"{url.scheme}://{url.netloc}", timeout=30.0) as line:
            answer = line.request("POST", url.path, body=body, headers=headers)
        if answer.status != 200:
            raise ConfigurationError(f"{self._url} issued no token: {answer.error or answer.status}")
        reply = answer.json()
        return str(reply["access_token"]), float(reply["expires_in"])


@dataclass(frozen=True, kw_only=True, slots=True)
class SigV4Authenticator:
    """Signs with AWS Signature Version 4, including the body unless `unsigned_payload`."""

    access_key: str
    secret: str = field(repr=False)
    region: str
    service: str
    session_token: str | None = field(default=None, repr=False)
    unsigned_payload: bool = False

    def headers(self, request: OutgoingRequest, *, now: float) -> dict[str, str]:
        """Return Authorization, X-Amz-Date, and other headers that the settings require."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        added = {"x-amz-date": stamp}
        if self.session_token is not None:
            added["x-amz-security-token"] = self.session_token
        payload = hashlib.sha256(request.body).hexdigest()
        if self.unsigned_payload:
            payload = added["x-amz-content-sha256"] = "UNSIGNED-PAYLOAD"
        signed = {"host": request.host, **added}
        if "content-type" in request.headers:
            signed["content-type"] = request.headers["content-type"]
        path, _, query = request.target.partition("?")
        pairs = sorted(
            (quote(unquote(name), safe="-_.~"), quote(unquote(value), safe="-_.~"))
            for name, _, value in (part.partition("=") for part in query.split("&") if part)
        )
        names = ";".join(sorted(signed))
        canonical = "\n".join(
            [
                request.method,
                quote(path, safe="/-_.~"),
                "&".join(f"{name}={value}" for name, value in pairs),
                *(f"{name}:{' '.join(signed[name].split())}" for name in sorted(signed)),
                "",
                names,
                payload,
            ]
        )
        scope = f"{stamp[:8]}/{self.region}/{self.service}/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self.secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        return added | {
            "authorization": f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateAuthenticator:
    """Sends the headers by which a proxy reports a verified client certificate (PEM). Must be sent from the proxy's
    address.
    """

    proxy: Literal["nginx", "envoy", "aws-alb"]
    pem: str
    secret: str = field(repr=False)
    secret_header: str = "x-proxy-secret"  # noqa: S105 - a header's name

    def headers(self, _: OutgoingRequest, *, now: float) -> dict[str, str]:  # noqa: ARG002 - the interface
        """Return the proxy's headers."""
        pem = quote(self.pem, safe="")
        reported = {
            "nginx": {"ssl-client-verify": "SUCCESS", "ssl-client-cert": pem},
            "envoy": {"x-forwarded-client-cert": f'Cert="{pem}"'},
            "aws-alb": {"x-amzn-mtls-clientcert-leaf": pem},
        }[self.proxy]
        return reported | {self.secret_header: self.secret}
