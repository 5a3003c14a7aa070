"""Kind `sigv4`: AWS Signature Version 4 over the request as it arrived.

Redox: the AWS strategy, with the fields accessKey, secretKey, serviceName, awsRegion and sessionToken. What is computed
here stands in AWS's documentation ("Create a signed AWS API request"), with the path normalised and encoded twice, as
for every service but S3. The query is taken in two canonical forms: encoded anew, as AWS documents it, and as it was
sent, as botocore signs it.

Must not look at anything but the raw target, query, headers and body: a proxy that rewrites one of what was signed
makes the signature wrong. `host` must be signed; with `hosts` set, a request that was signed for another host is
refused, so that one recorded at another receiver with the same secret cannot be replayed here.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import ClassVar, Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.message import Head, Inbound, Nonce, Verified
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification.kind import Kind, Option, Secret, Settings, Stored, Takes

ALGORITHM: Final = b"AWS4-HMAC-SHA256"
UNSIGNED: Final = b"UNSIGNED-PAYLOAD"
# AWS: a request is refused five minutes after its time stamp, or before it.
WINDOW: Final = timedelta(minutes=5)
# Real ones have some 300 bytes and ten names.
MAX_HEADER: Final = 4 * 1024
MAX_SIGNED: Final = 64

_SIGNATURE: Final = re.compile(rb"[0-9a-f]{64}")
_STAMP: Final = re.compile(rb"[0-9]{8}T[0-9]{6}Z")
_HOST: Final = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")  # RFC 9110 7.2, in lower case
_FIELDS: Final = frozenset({b"Credential", b"SignedHeaders", b"Signature"})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Claim:
    """What the request says of its signature. `payload` None: the body's digest is to be computed."""

    access_key: bytes
    scope: bytes
    signed: tuple[str, ...]
    signature: bytes = field(repr=False)
    at: datetime
    payload: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SigV4Credential(Credential):
    """An access key that signs requests (AWS Signature Version 4), for one region and service.

    `unsigned_payload`: whether a request may leave its body out of the signature. `hosts`: the values of the Host
    header, in lower case, that it may be signed for; empty: any.
    """

    access_key: str
    secret: bytes = field(repr=False)
    region: str
    service: str
    session_token: bytes | None = field(default=None, repr=False)
    unsigned_payload: bool = False
    hosts: tuple[str, ...] = ()


class SigV4Settings(Settings, kw_only=True):
    """Those of SigV4Credential. The sealed secret has the session token, if there is one, on a second line."""

    access_key: str
    region: str
    service: str
    unsigned_payload: bool = False
    hosts: list[str] = msgspec.field(default_factory=list)


class SigV4Kind(Kind[SigV4Settings, SigV4Credential]):
    """A signature over the request."""

    name = "sigv4"
    says = "AWS Signature Version 4"
    settings = SigV4Settings
    credential = SigV4Credential
    secret = Secret.SEALED
    second_secret = "session_token"  # noqa: S105 - a field's name
    options = (
        Takes(option=Option(name="access_key", help="the access key."), needed=True),
        Takes(option=Option(name="region", help="the region."), needed=True),
        Takes(option=Option(name="service", help="the service's name."), needed=True),
        Takes(
            option=Option(
                name="host",
                metavar="HOST[:PORT]",
                multiple=True,
                help="a Host header that a request may be signed for; may be repeated.  [default: any]",
            ),
            setting="hosts",
        ),
        Takes(option=Option(name="unsigned_payload", flag=True, help="let the body be left out of the signature.")),
    )
    reasons: ClassVar = {
        "sigv4_malformed": "Authorization or X-Amz-Date is not as AWS documents it, or the body is signed in chunks",
        "sigv4_stale": "the signature is more than five minutes old: compare the clocks too",
        "sigv4_header_missing": "a signed header has not arrived: see whether the proxy drops it",
        "sigv4_host_unsigned": "Host is not among the signed headers",
        "sigv4_host_wrong": "the request was signed for another host than the credential allows (--host)",
        "sigv4_credential_missing": "no credential has that access key",
        "sigv4_credential_expired": "the credential of that access key has expired or was revoked",
        "sigv4_scope_wrong": "the signature is for another day, region or service",
        "sigv4_session_token_wrong": "the session token is another than the credential's",
        "sigv4_payload_unsigned": "the body is not signed, and the credential wants it to be (--unsigned-payload)",
        "sigv4_payload_differs": "the body is another than the one that was signed",
        "sigv4_signature_wrong": "the signature does not hold: compare the secret, and what the proxy passes on",
    }

    def normalise(self, read: SigV4Settings) -> SigV4Settings:
        """Hosts in lower case."""
        return msgspec.structs.replace(read, hosts=[_host(each) for each in read.hosts])

    def make(self, read: SigV4Settings, stored: Stored) -> SigV4Credential:
        """The secret, the session token on its second line, and every setting."""
        key, newline, session = stored.secret.partition(b"\n")
        return SigV4Credential(
            secret=key,
            session_token=session if newline else None,
            **stored.common | msgspec.structs.asdict(read) | {"hosts": tuple(read.hosts)},
        )

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """An `Authorization` of AWS's, where the destination requires it."""
        return self.name in destination.kinds and (head.header("authorization") or b"").startswith(b"AWS4-")

    def screen(self, head: Head, destination: Destination, now: datetime) -> None:
        """All but the body; the signature too, where the head names the body's digest."""
        claim = _read(head)
        self._match(head, claim, claim.payload, destination, now)

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that matched; its signature is good once in its window.

        Raises Unverified: `sigv4_malformed`, `_stale`, `_header_missing`, `_host_unsigned`, `_credential_missing`,
        `_credential_expired`, `_scope_wrong`, `_session_token_wrong`, `_payload_unsigned`, `_signature_wrong`,
        `_payload_differs`, `_host_wrong`.
        """
        claim = _read(inbound.head)
        digest = b"" if claim.payload == UNSIGNED else sha256(inbound.body).hexdigest().encode()
        matched = self._match(inbound.head, claim, claim.payload or digest, destination, now)
        if claim.payload not in (None, UNSIGNED, digest):
            raise Unverified("sigv4_payload_differs")
        once = Nonce.of(f"{self.name} {destination.id}", claim.signature, claim.at + WINDOW + timedelta(seconds=1))
        return Verified(credentials=(matched,), kinds=frozenset({self.name}), nonces=(once,))

    def _match(self, head: Head, claim: _Claim, payload: bytes | None, destination: Destination, now: datetime) -> int:
        """The credential whose signature it is; with `payload` None the one whose it may be."""
        if abs(now - claim.at) > WINDOW:
            raise Unverified("sigv4_stale")
        usable = self.held(destination)
        for reason, holds in _conditions(head, claim, payload, now):
            usable = [each for each in usable if holds(each)]
            if not usable:
                raise Unverified(reason)
        if payload is None:
            return usable[0].id
        signed = _strings_to_sign(head, claim, payload)
        found = None
        for each in usable:
            for text in signed:
                if hmac.compare_digest(_sign(each, claim, text), claim.signature):
                    found = each.id
        if found is None:
            raise Unverified("sigv4_signature_wrong")
        return found


def _host(text: str) -> str:
    host = text.lower()
    if not _HOST.fullmatch(host):
        raise ConfigurationError(
            f"{text!r} is not a valid host: write it as the Host header has it, such as "
            "hooks.example.org or hooks.example.org:8443"
        )
    return host


def _conditions(
    head: Head, claim: _Claim, payload: bytes | None, now: datetime
) -> Iterator[tuple[str, Callable[[SigV4Credential], bool]]]:
    """What a credential must be before the signature is looked at, with the reason where none is."""
    host, session = (head.header("host") or b"").lower(), head.header("x-amz-security-token") or b""
    yield "sigv4_credential_missing", lambda each: each.access_key.encode() == claim.access_key
    yield "sigv4_credential_expired", lambda each: live(each, now)
    yield "sigv4_scope_wrong", lambda each: _scope(each, claim.at) == claim.scope
    yield "sigv4_host_wrong", lambda each: not each.hosts or host in [name.encode() for name in each.hosts]
    yield "sigv4_session_token_wrong", lambda each: hmac.compare_digest(session, each.session_token or b"")
    yield "sigv4_payload_unsigned", lambda each: payload != UNSIGNED or each.unsigned_payload


def _read(head: Head) -> _Claim:
    """What the head claims. Raises Unverified, whatever the bytes."""
    value = head.header("authorization") or b""
    algorithm, _, rest = value.partition(b" ")
    parts = rest.split(b",", len(_FIELDS))
    fields = {name: text for name, _, text in (part.strip(b" \t").partition(b"=") for part in parts)}
    if len(value) > MAX_HEADER or algorithm != ALGORITHM or len(parts) != len(_FIELDS) or fields.keys() != _FIELDS:
        raise Unverified("sigv4_malformed")
    access_key, *scope = fields[b"Credential"].rsplit(b"/", 4)  # KEY/date/region/service/aws4_request
    names = fields[b"SignedHeaders"].split(b";", MAX_SIGNED)
    if (
        not access_key
        or not _SIGNATURE.fullmatch(fields[b"Signature"])
        or len(names) > MAX_SIGNED
        or names != sorted({name.lower() for name in names})
    ):
        raise Unverified("sigv4_malformed")
    signed = tuple(name.decode("latin-1") for name in names)
    if "host" not in signed:
        raise Unverified("sigv4_host_unsigned")
    if any(name not in head.headers for name in signed):
        raise Unverified("sigv4_header_missing")
    payload = head.header("x-amz-content-sha256")
    if payload is not None and payload != UNSIGNED and not _SIGNATURE.fullmatch(payload):
        raise Unverified("sigv4_malformed")  # a body signed in chunks, or none of AWS's forms
    return _Claim(
        access_key=access_key,
        scope=b"/".join(scope),
        signed=signed,
        signature=fields[b"Signature"],
        at=_time(head),
        payload=payload,
    )


def _time(head: Head) -> datetime:
    stamp = head.header("x-amz-date") or b""
    try:
        if _STAMP.fullmatch(stamp):
            return datetime.fromisoformat(stamp.decode())
    except ValueError:  # the 31st of February
        pass
    raise Unverified("sigv4_malformed")


def _scope(credential: SigV4Credential, at: datetime) -> bytes:
    return f"{at:%Y%m%d}/{credential.region}/{credential.service}/aws4_request".encode()


def _strings_to_sign(head: Head, claim: _Claim, payload: bytes) -> list[bytes]:
    """What the signature may be over, once for each canonical form of the query; they differ for few queries."""
    query = head.query.encode("latin-1", "replace")
    forms = dict.fromkeys((_query(query), _query_as_sent(query)))
    return [_string_to_sign(head, claim, payload, form) for form in forms]


def _string_to_sign(head: Head, claim: _Claim, payload: bytes, query: bytes) -> bytes:
    """Algorithm, time, scope, and the digest of the canonical request."""
    lines = [head.method.encode(), _path(head.target.encode("latin-1", "replace")), query]
    lines += [name.encode("latin-1") + b":" + b" ".join((head.header(name) or b"").split()) for name in claim.signed]
    lines += [b"", ";".join(claim.signed).encode("latin-1"), payload]
    digest = sha256(b"\n".join(lines)).hexdigest().encode()
    return b"\n".join([ALGORITHM, f"{claim.at:%Y%m%dT%H%M%SZ}".encode(), claim.scope, digest])


def _path(target: bytes) -> bytes:
    """The path with dot segments and doubled slashes taken out, each byte that is not unreserved encoded."""
    kept: list[bytes] = []
    for segment in target.split(b"/"):
        if segment == b"..":
            del kept[-1:]
        elif segment not in (b"", b"."):
            kept.append(segment)
    return b"/" + quote(b"/".join(kept)).encode() + (b"/" if kept and target.endswith(b"/") else b"")


def _query(query: bytes) -> bytes:
    """The parameters, each encoded in the one way, sorted by name and then by value."""
    pairs = sorted(
        tuple(quote(unquote_to_bytes(text), safe="") for text in part.partition(b"=")[::2])
        for part in query.split(b"&")
        if part
    )
    return "&".join("=".join(pair) for pair in pairs).encode()


def _query_as_sent(query: bytes) -> bytes:
    """The parameters, sorted and not encoded anew: what botocore signs of a URL that holds its query already."""
    pairs = sorted(part.partition(b"=")[::2] for part in query.split(b"&")) if query else []
    return b"&".join(b"=".join(pair) for pair in pairs)


def _sign(credential: SigV4Credential, claim: _Claim, signed: bytes) -> bytes:
    key = b"AWS4" + credential.secret
    for part in claim.scope.split(b"/"):
        key = hmac.digest(key, part, "sha256")
    return hmac.digest(key, signed, "sha256").hex().encode()
