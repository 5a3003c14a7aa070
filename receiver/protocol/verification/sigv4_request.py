"""The signed request of AWS Signature Version 4: reads a request's signature, and computes what has to be signed.

The algorithm is AWS's ("Create a signed AWS API request"), with the path normalized and encoded twice, as for every
service but S3. The query has two canonical forms: encoded again, as AWS documents it, and as sent, as botocore signs
it.

Must use only the raw target, query, headers and body: the signature is wrong if a proxy rewrites a signed part.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from receiver.errors import Unverified
from receiver.protocol.message import Head

ALGORITHM: Final = b"AWS4-HMAC-SHA256"
UNSIGNED: Final = b"UNSIGNED-PAYLOAD"
# Real headers have about 300 bytes and ten names.
MAX_HEADER: Final = 4 * 1024
MAX_SIGNED: Final = 64

_SIGNATURE: Final = re.compile(rb"[0-9a-f]{64}")
_STAMP: Final = re.compile(rb"[0-9]{8}T[0-9]{6}Z")
_FIELDS: Final = frozenset({b"Credential", b"SignedHeaders", b"Signature"})


@dataclass(frozen=True, kw_only=True, slots=True)
class SigV4Claim:
    """The request's statements about its signature. `payload` None: the body's digest has to be computed."""

    access_key: bytes
    scope: bytes
    signed: tuple[str, ...]
    signature: bytes = field(repr=False)
    at: datetime
    payload: bytes | None


def read_claim(head: Head) -> SigV4Claim:
    """Read the head's statements. Raises Unverified for any invalid bytes."""
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
        raise Unverified("sigv4_malformed")  # a body signed in chunks, or a form that AWS does not have
    return SigV4Claim(
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


def strings_to_sign(head: Head, claim: SigV4Claim, payload: bytes) -> list[bytes]:
    """Return the strings that may be signed: one for each canonical form of the query. They differ for few queries."""
    query = head.query.encode("latin-1", "replace")
    forms = dict.fromkeys((_query(query), _query_as_sent(query)))
    return [_string_to_sign(head, claim, payload, form) for form in forms]


def _string_to_sign(head: Head, claim: SigV4Claim, payload: bytes, query: bytes) -> bytes:
    """Return algorithm, time, scope, and the digest of the canonical request."""
    lines = [head.method.encode(), _path(head.target.encode("latin-1", "replace")), query]
    lines += [name.encode("latin-1") + b":" + b" ".join((head.header(name) or b"").split()) for name in claim.signed]
    lines += [b"", ";".join(claim.signed).encode("latin-1"), payload]
    digest = sha256(b"\n".join(lines)).hexdigest().encode()
    return b"\n".join([ALGORITHM, f"{claim.at:%Y%m%dT%H%M%SZ}".encode(), claim.scope, digest])


def _path(target: bytes) -> bytes:
    """Return the path without dot segments and doubled slashes, with every byte encoded that is not unreserved."""
    kept: list[bytes] = []
    for segment in target.split(b"/"):
        if segment == b"..":
            del kept[-1:]
        elif segment not in (b"", b"."):
            kept.append(segment)
    return b"/" + quote(b"/".join(kept)).encode() + (b"/" if kept and target.endswith(b"/") else b"")


def _query(query: bytes) -> bytes:
    """Return the parameters, each encoded in one way, sorted by name and then by value."""
    pairs = sorted(
        tuple(quote(unquote_to_bytes(text), safe="") for text in part.partition(b"=")[::2])
        for part in query.split(b"&")
        if part
    )
    return "&".join("=".join(pair) for pair in pairs).encode()


def _query_as_sent(query: bytes) -> bytes:
    """Return the parameters, sorted and not encoded again: botocore signs a URL with a query in this form."""
    pairs = sorted(part.partition(b"=")[::2] for part in query.split(b"&")) if query else []
    return b"&".join(b"=".join(pair) for pair in pairs)


def sign(secret: bytes, claim: SigV4Claim, text: bytes) -> bytes:
    """Return the signature of a string to sign."""
    key = b"AWS4" + secret
    for part in claim.scope.split(b"/"):
        key = hmac.digest(key, part, "sha256")
    return hmac.digest(key, text, "sha256").hex().encode()
