"""Kind `token`: the verification token, which the owner of the destination enters in the dashboard.

Redox sends it with every message in the header `verification-token`, and since about 2021 as `authorization: Bearer
<token>` too; with a linked auth credential, `authorization` carries that credential instead. So `verification-token` is
checked first, and a Bearer value must be the same token unless it has the shape of another credential's (a JWT).

Must not compare text, nor stop at the first match: it compares digests of bytes, in constant time.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Final

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.digests import hmac_sha256
from receiver.protocol.message import Head
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification.kind import (
    MIN_SECRET_LENGTH,
    CredentialSettings,
    HeadKind,
    SecretStorage,
    StoredCredential,
)

_HEADER: Final = "verification-token"
_BEARER: Final = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCredential(Credential):
    """A verification token, stored as HMAC-SHA256 under `key` (derived from the keyring's index key)."""

    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)


class TokenSettings(CredentialSettings, kw_only=True):
    """The settings of a verification token: none."""


class TokenKind(HeadKind[TokenSettings, TokenCredential]):
    """The verification token."""

    name = "token"
    text = "the verification token"
    settings = TokenSettings
    credential = TokenCredential
    secret = SecretStorage.DIGESTED
    digest_label = "verification token"
    generated_secret = "verification_token"  # noqa: S105 - a field's name
    reasons: ClassVar = {
        "token_wrong": "the verification token is not one of this destination's: enter a new one in Redox",
        "token_expired": "the verification token has expired: enter a new one in Redox",
        "token_revoked": "the verification token was revoked: enter a new one in Redox",
        "bearer_differs": "the request has two different tokens",
    }

    def check_secret(self, secret: bytes | None) -> None:
        """Raise ConfigurationError for a token that could be guessed, or that is not valid in a header."""
        text = (secret or b"").decode("ascii", "replace")
        if len(text) < MIN_SECRET_LENGTH or not text.isascii() or not text.isprintable() or text != text.strip():
            raise ConfigurationError(
                f"a verification token has at least {MIN_SECRET_LENGTH} printable ASCII characters and no space around "
                "it: omit the file to generate one"
            )

    def make(self, settings: TokenSettings, stored: StoredCredential) -> TokenCredential:  # noqa: ARG002 - interface
        """Return the digest of the token."""
        return TokenCredential(digest=stored.digest, key=stored.digest_key, **stored.common)

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - interface
        """A token header, or a Bearer value that is not a JWT."""
        return _HEADER in head.headers or bearer(head) is not None

    def match(self, head: Head, destination: Destination, now: datetime) -> int:
        """Return the id of the credential that matches. Raises Unverified: see `match_token`, and `bearer_differs`."""
        token, value = head.header(_HEADER), bearer(head)
        if token is None:
            assert value is not None
            return match_token(value, destination, now)
        matched = match_token(token, destination, now)
        if value is not None and not hmac.compare_digest(value, token):
            raise Unverified("bearer_differs")
        return matched


def match_token(token: bytes, destination: Destination, now: datetime) -> int:
    """Return the id of the live credential that has this token.

    Raises Unverified: `token_wrong`, `token_expired`, `token_revoked`.
    """
    found = None
    for credential in _tokens(destination):
        # All are compared: the time does not depend on which credential matches.
        if hmac.compare_digest(hmac_sha256(credential.key, token), credential.digest):
            found = credential if found is None or live(credential, now) else found
    if found is None:
        raise Unverified("token_wrong")
    if not live(found, now):
        raise Unverified("token_revoked" if found.revoked else "token_expired")
    return found.id


def _tokens(destination: Destination) -> list[TokenCredential]:
    return [credential for credential in destination.credentials if isinstance(credential, TokenCredential)]


def bearer(head: Head) -> bytes | None:
    """Return the Bearer value if this kind has to verify it."""
    authorization = head.header("authorization")
    found = None if authorization is None else _BEARER.fullmatch(authorization)
    if found is None:
        return None
    value = found[1]
    # A value with the shape of a JWT belongs to a linked auth credential, unless it is the verification token itself.
    if _JWT.fullmatch(value) and value != head.header(_HEADER):
        return None
    return value
