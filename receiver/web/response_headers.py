"""The header fields of a reply, the same in every server mode.

Must not know a framework: fields come out as pairs.
"""

from __future__ import annotations

from functools import lru_cache

from receiver.protocol.message import Reply

Fields = tuple[tuple[str, str], ...]


def fields(reply: Reply, *, realm: str = "Bearer") -> Fields:
    """The header fields of `reply`; they forbid caching and type sniffing. `realm`: the challenge of a 401."""
    return _fields(reply.media, reply.retry_after, realm if reply.status == 401 else None, reply.close)


def token_fields(reply: Reply) -> Fields:
    """The header fields of the token endpoint (RFC 6749 sections 5.1, 5.2)."""
    return (*fields(reply, realm='Basic realm="oauth"'), ("Pragma", "no-cache"))


@lru_cache(maxsize=64)
def _fields(media: str, retry_after: int | None, challenge: str | None, close: bool) -> Fields:
    found = [("Content-Type", media), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]
    if retry_after is not None:
        found.append(("Retry-After", str(retry_after)))
    if challenge is not None:  # RFC 9110 section 11.6.1
        found.append(("WWW-Authenticate", challenge))
    if close:
        found.append(("Connection", "close"))
    return tuple(found)
