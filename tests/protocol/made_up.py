"""Made-up destinations, credentials and requests for the tests of receiver.protocol.

Must not compute a digest or a signature: openssl made those here, so that the code under test is compared with another
implementation. The command is above each.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Literal

from receiver.protocol.message import Head, Inbound, Method
from receiver.protocol.registry import Credential, Destination, Registry
from receiver.protocol.verification.hmac import HmacCredential
from receiver.protocol.verification.token import TokenCredential

Which = Literal["first", "second"]

NOW: Final = datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)
SOURCE: Final = "7ce6f387-c33c-417d-8682-81e83628cbd9"

# A message of an invented patient, which is signed below. 138 bytes, of which é has two.
BODY: Final = (
    '{"Meta":{"DataModel":"PatientAdmin","EventType":"Arrival",'
    '"Source":{"ID":"7ce6f387-c33c-417d-8682-81e83628cbd9"}},"Patient":{"Note":"é"}}'
).encode()

TOKENS: Final[Mapping[Which, str]] = {
    "first": "first-made-up-token-0123456789abcdef",
    "second": "second-made-up-token-0123456789abcde",
}
TOKEN_KEY: Final = b"a made-up key for digests, 32 b."
# printf '%s' "$TOKEN" | openssl dgst -sha256 -hmac 'a made-up key for digests, 32 b.'
TOKEN_DIGESTS: Final[Mapping[Which, str]] = {
    "first": "f239dee338f514cbee1c05abf72f8d15f7b52ffb6b0cb0b9e6d462434f503712",
    "second": "4483da30d3e9a14541ce072d7a9e0c0a6ff7e5f9401407b7d48cd57297693f0e",
}

SECRETS: Final[Mapping[Which, str]] = {
    "first": "first-made-up-signing-secret",
    "second": "second-made-up-signing-secret",
}
# openssl dgst -sha256 -hmac "$SECRET" -binary body | base64
SIGNATURES: Final[Mapping[Which, str]] = {
    "first": "TIG7Yi1tEVxSIXNMKCs2e7sWIqdptunmAbv4y50tsP8=",
    "second": "Au/bu/g1nnu9usH2bi7QaPhWTF8xG6g2Gk4jdFVKMHY=",
}


def token(
    which: Which = "first",
    *,
    id: int = 1,  # noqa: A002
    expires_at: datetime | None = None,
    revoked: bool = False,
) -> TokenCredential:
    """A verification token."""
    return TokenCredential(
        id=id, digest=bytes.fromhex(TOKEN_DIGESTS[which]), key=TOKEN_KEY, expires_at=expires_at, revoked=revoked
    )


def signing(
    which: Which = "first",
    *,
    id: int = 1,  # noqa: A002
    expires_at: datetime | None = None,
    revoked: bool = False,
) -> HmacCredential:
    """A webhook signing secret with default settings."""
    return HmacCredential(id=id, secret=SECRETS[which].encode(), expires_at=expires_at, revoked=revoked)


def destination(
    *credentials: Credential, require: tuple[str, ...] = ("token",), name: str = "main", **policies: object
) -> Destination:
    """A destination with these credentials and SOURCE. `require`: as for `parse_require`."""
    values: dict[str, object] = {
        "id": 1,
        "name": name,
        "environment": "staging",
        "enabled": True,
        "sources": {SOURCE: True},
        **policies,
    }
    alternatives = tuple(frozenset(alternative.split("+")) for alternative in require)
    return Destination(require=alternatives, credentials=credentials, **values)  # type: ignore[arg-type] # by field name


def registry(*destinations: Destination) -> Registry:
    """A registry of these destinations."""
    return Registry(version=1, destinations={each.name: each for each in destinations})


def head(
    headers: Mapping[str, str] | None = None,
    *,
    method: Method = "POST",
    query: str = "",
    name: str = "main",
    proxied: bool = True,
) -> Head:
    """A request's head, as the endpoint makes it; from a trusted proxy by default."""
    return Head(
        destination=name,
        method=method,
        headers=headers or {},
        target=f"/redox/{name}",
        query=query,
        peer="192.0.2.1",
        received_at=NOW,
        proxied=proxied,
    )


def inbound(
    body: bytes = BODY,
    headers: Mapping[str, str] | None = None,
    *,
    method: Method = "POST",
    query: str = "",
    name: str = "main",
) -> Inbound:
    """A whole request."""
    return Inbound(head=head(headers, method=method, query=query, name=name), body=body)
