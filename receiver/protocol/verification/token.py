"""Kind `token`: the static verification token that the destination's owner typed into the dashboard.

Redox: on every message header `verification-token: <token>`, and since about 2021 `authorization: Bearer <token>` too;
with a linked auth credential `authorization` carries that instead. So `verification-token` is trusted first, and a
Bearer value must be the same token unless it is shaped like somebody else's (a JWT).

May not compare text, nor stop at the first match: bytes, by digest, in constant time.
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
from receiver.protocol.registry import MIN_TOKEN_LENGTH, Credential, Destination, live
from receiver.protocol.verification.kind import HeadKind, Secret, Settings, Stored

_HEADER: Final = "verification-token"
_BEARER: Final = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCredential(Credential):
    """A verification token, kept as HMAC-SHA256 under `key` (derived from the keyring's index key)."""

    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)


class TokenSettings(Settings, kw_only=True):
    """A verification token has none."""


class TokenKind(HeadKind[TokenSettings, TokenCredential]):
    """The verification token."""

    name = "token"
    says = "the verification token"
    settings = TokenSettings
    credential = TokenCredential
    secret = Secret.DIGESTED
    digest_label = "verification token"
    made = "verification_token"
    reasons: ClassVar = {
        "token_wrong": "the verification token is not one of this destination's",
        "token_expired": "the verification token has expired",
        "token_revoked": "the verification token was revoked",
        "bearer_differs": "the request has two different tokens",
    }

    def check_secret(self, secret: bytes | None) -> None:
        """Raise ConfigurationError for a token that could be guessed, or that no header can carry."""
        text = (secret or b"").decode("ascii", "replace")
        if len(text) < MIN_TOKEN_LENGTH or not text.isascii() or not text.isprintable() or text != text.strip():
            raise ConfigurationError(
                f"a verification token has at least {MIN_TOKEN_LENGTH} printable ASCII characters "
                "and no space around it: leave --token-file away and one is made"
            )

    def make(self, read: TokenSettings, stored: Stored) -> TokenCredential:  # noqa: ARG002 - Kind's
        """The digest of the token."""
        return TokenCredential(digest=stored.digest, key=stored.digest_key, **stored.common)

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """A token header, or an opaque Bearer value."""
        return _HEADER in head.headers or bearer(head) is not None

    def judge(self, head: Head, destination: Destination, now: datetime) -> int:
        """The one credential that matched. Raises Unverified: see `match`, and `bearer_differs`."""
        token, value = head.header(_HEADER), bearer(head)
        if token is None:
            assert value is not None
            return match(value, destination, now)
        matched = match(token, destination, now)
        if value is not None and not hmac.compare_digest(value, token):
            raise Unverified("bearer_differs")
        return matched


def match(token: bytes, destination: Destination, now: datetime) -> int:
    """The id of the live credential whose token this is.

    Raises Unverified: `token_wrong`, `token_expired`, `token_revoked`.
    """
    found = None
    for credential in _tokens(destination):
        # No early end: the time taken tells nothing about which credential matched.
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
    """The Bearer value when it is this kind's to judge."""
    authorization = head.header("authorization")
    found = None if authorization is None else _BEARER.fullmatch(authorization)
    if found is None:
        return None
    value = found[1]
    # Shaped like a JWT: it belongs to a linked auth credential, and proves nothing here, unless it is the very token.
    if _JWT.fullmatch(value) and value != head.header(_HEADER):
        return None
    return value
