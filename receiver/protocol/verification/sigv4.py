"""Kind `sigv4`: AWS Signature Version 4 over the request as it arrived.

Redox: the AWS strategy, with the fields accessKey, secretKey, serviceName, awsRegion and sessionToken. The signature is
computed in `sigv4_request`.

`host` must be signed. With `hosts`, a request that was signed for another host is refused: a request that was recorded
at another receiver with the same secret cannot be replayed here.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import ClassVar, Final

import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.message import Head, Inbound, Nonce, Verified
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification.kind import (
    BodyKind,
    CredentialOption,
    CredentialSettings,
    OptionUse,
    SecretStorage,
    StoredCredential,
)
from receiver.protocol.verification.sigv4_request import UNSIGNED, SigV4Claim, read_claim, sign, strings_to_sign

# AWS: the timestamp of a request may differ by five minutes, in either direction.
WINDOW: Final = timedelta(minutes=5)
_HOST: Final = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")  # RFC 9110 7.2, in lower case


@dataclass(frozen=True, kw_only=True, slots=True)
class SigV4Credential(Credential):
    """An access key that signs requests, for one region and service.

    `unsigned_payload`: whether a signature may omit the body. `hosts`: the accepted values of the Host header, in lower
    case; empty: any.
    """

    access_key: str
    secret: bytes = field(repr=False)
    region: str
    service: str
    session_token: bytes | None = field(default=None, repr=False)
    unsigned_payload: bool = False
    hosts: tuple[str, ...] = ()


class SigV4Settings(CredentialSettings, kw_only=True):
    """The settings of SigV4Credential. The sealed secret has the session token, if any, on a second line."""

    access_key: str
    region: str
    service: str
    unsigned_payload: bool = False
    hosts: list[str] = msgspec.field(default_factory=list)


class SigV4Kind(BodyKind[SigV4Settings, SigV4Credential]):
    """A signature over the request."""

    name = "sigv4"
    text = "AWS Signature Version 4"
    settings = SigV4Settings
    credential = SigV4Credential
    secret = SecretStorage.SEALED
    second_secret = "session_token"  # noqa: S105 - a field's name
    options = (
        OptionUse(option=CredentialOption(name="access_key", help="AWS access key id."), required=True),
        OptionUse(option=CredentialOption(name="region", help="AWS region."), required=True),
        OptionUse(option=CredentialOption(name="service", help="AWS service name."), required=True),
        OptionUse(
            option=CredentialOption(
                name="host",
                metavar="HOST[:PORT]",
                multiple=True,
                help="accepted Host header; may be repeated.  [default: any]",
            ),
            setting="hosts",
        ),
        OptionUse(
            option=CredentialOption(
                name="unsigned_payload", flag=True, help="accept signatures that do not cover the body."
            )
        ),
    )
    reasons: ClassVar = {
        "sigv4_malformed": "Authorization or X-Amz-Date does not have AWS's format, or the body is signed in chunks",
        "sigv4_stale": "the signature is more than five minutes old: compare the clocks",
        "sigv4_header_missing": "a signed header is missing: check whether a proxy removes it",
        "sigv4_host_unsigned": "Host is not among the signed headers",
        "sigv4_host_wrong": "the request was signed for a host that the credential does not accept (--host)",
        "sigv4_credential_missing": "no credential has that access key",
        "sigv4_credential_expired": "the credential of that access key has expired or was revoked: add another",
        "sigv4_scope_wrong": "the signature is for another day, region or service",
        "sigv4_session_token_wrong": "the session token is not the credential's",
        "sigv4_payload_unsigned": "the body is not signed, which the credential requires (--unsigned-payload)",
        "sigv4_payload_differs": "the body is not the one that was signed",
        "sigv4_signature_wrong": (
            "the signature does not verify: compare the secret, and check whether a proxy changes requests"
        ),
    }

    def normalize(self, settings: SigV4Settings) -> SigV4Settings:
        """Convert hosts to lower case."""
        return msgspec.structs.replace(settings, hosts=[_host(each) for each in settings.hosts])

    def make(self, settings: SigV4Settings, stored: StoredCredential) -> SigV4Credential:
        """Return the secret, the session token of its second line, and every setting."""
        key, newline, session = stored.secret.partition(b"\n")
        return SigV4Credential(
            secret=key,
            session_token=session if newline else None,
            **stored.common | msgspec.structs.asdict(settings) | {"hosts": tuple(settings.hosts)},
        )

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - the interface
        """AWS's form of `Authorization`, if the destination requires it."""
        return self.name in destination.kinds and (head.header("authorization") or b"").startswith(b"AWS4-")

    def screen(self, head: Head, destination: Destination, now: datetime) -> None:
        """Check everything but the body, and the signature if the head has the body's digest."""
        claim = read_claim(head)
        self._match(head, claim, claim.payload, destination, now)

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """Return the credential that matched. Its signature is valid once.

        Raises Unverified: `sigv4_malformed`, `_stale`, `_header_missing`, `_host_unsigned`, `_credential_missing`,
        `_credential_expired`, `_scope_wrong`, `_session_token_wrong`, `_payload_unsigned`, `_signature_wrong`,
        `_payload_differs`, `_host_wrong`.
        """
        claim = read_claim(inbound.head)
        digest = b"" if claim.payload == UNSIGNED else sha256(inbound.body).hexdigest().encode()
        matched = self._match(inbound.head, claim, claim.payload or digest, destination, now)
        if claim.payload not in (None, UNSIGNED, digest):
            raise Unverified("sigv4_payload_differs")
        once = Nonce.of(f"{self.name} {destination.id}", claim.signature, claim.at + WINDOW + timedelta(seconds=1))
        return Verified(credentials=(matched,), kinds=frozenset({self.name}), nonces=(once,))

    def _match(
        self, head: Head, claim: SigV4Claim, payload: bytes | None, destination: Destination, now: datetime
    ) -> int:
        """Return the credential that made the signature; with `payload` None, one that could have made it."""
        if abs(now - claim.at) > WINDOW:
            raise Unverified("sigv4_stale")
        usable = self.held(destination)
        for reason, holds in _conditions(head, claim, payload, now):
            usable = [each for each in usable if holds(each)]
            if not usable:
                raise Unverified(reason)
        if payload is None:
            return usable[0].id
        signed = strings_to_sign(head, claim, payload)
        found = None
        for each in usable:
            for text in signed:
                if hmac.compare_digest(sign(each.secret, claim, text), claim.signature):
                    found = each.id
        if found is None:
            raise Unverified("sigv4_signature_wrong")
        return found


def _host(text: str) -> str:
    host = text.lower()
    if not _HOST.fullmatch(host):
        raise ConfigurationError(
            f"{text!r} is not a valid host: write it as in the Host header, such as "
            "hooks.example.org or hooks.example.org:8443"
        )
    return host


def _conditions(
    head: Head, claim: SigV4Claim, payload: bytes | None, now: datetime
) -> Iterator[tuple[str, Callable[[SigV4Credential], bool]]]:
    """The conditions that a credential must meet before the signature is checked, with the reason if none does."""
    host, session = (head.header("host") or b"").lower(), head.header("x-amz-security-token") or b""
    yield "sigv4_credential_missing", lambda each: each.access_key.encode() == claim.access_key
    yield "sigv4_credential_expired", lambda each: live(each, now)
    yield "sigv4_scope_wrong", lambda each: _scope(each, claim.at) == claim.scope
    yield "sigv4_host_wrong", lambda each: not each.hosts or host in [name.encode() for name in each.hosts]
    yield "sigv4_session_token_wrong", lambda each: hmac.compare_digest(session, each.session_token or b"")
    yield "sigv4_payload_unsigned", lambda each: payload != UNSIGNED or each.unsigned_payload


def _scope(credential: SigV4Credential, at: datetime) -> bytes:
    return f"{at:%Y%m%d}/{credential.region}/{credential.service}/aws4_request".encode()
