"""Kind `token`: the static verification token that the destination's owner typed into the dashboard.

Redox: on every message header `verification-token: <token>`, and since about 2021 `authorization: Bearer <token>` too;
with a linked auth credential `authorization` carries that instead. So `verification-token` is trusted first, and a
Bearer value must be the same token unless it is shaped like somebody else's (a JWT).

Must not compare text, nor stop at the first match: bytes, by digest, in constant time.
"""

from __future__ import annotations

import hmac
import re
from datetime import datetime
from typing import Final

from receiver.errors import Unverified
from receiver.protocol.digests import hmac_sha256
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Destination, TokenCredential, live

_HEADER: Final = "verification-token"
_BEARER: Final = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


class TokenKind:
    """The verifier of `token`."""

    name = "token"
    by_head = True
    credential = TokenCredential

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """A token header, or an opaque Bearer value."""
        return _HEADER in head.headers or bearer(head) is not None

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that matched. Raises Unverified: see `match`, and `bearer_differs`."""
        return Verified(credentials=(self._judge(inbound.head, destination, now),), kinds=frozenset({self.name}))

    def _judge(self, head: Head, destination: Destination, now: datetime) -> int:
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
