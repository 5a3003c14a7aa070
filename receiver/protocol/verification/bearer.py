"""Assigns a signed token in `Authorization: Bearer` to a kind: each kind with such tokens asks here.

`Authorization` is classified by shape. Anything but a JWT is left to the verification token. A JWT belongs to the kind
that has a credential for its issuer. A JWT of an unknown issuer belongs to every kind that the destination requires,
and each refuses it. A kind that the destination does not require claims nothing: until then a token proves nothing.

Must not trust a token: it is read only to find the kind that verifies it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

from receiver.errors import Unverified
from receiver.protocol import jose
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination
from receiver.protocol.verification.public_keys import PublicKeyCredential

# The issuer of this receiver's own access tokens. It is not a URL, and not the name of another issuer.
OWN_ISSUER: Final = "redox-receiver"
OWN_KINDS: Final = ("oauth", "smart")
_BEARER: Final = re.compile(r"(?i:bearer) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedCredential(PublicKeyCredential):
    """Tokens that an issuer signs, presented as Bearer. `kind`: the kind's name."""

    kind: ClassVar[str]


def presented(head: Head) -> bytes | None:
    """Return the token, if one with the shape of a JWT is presented."""
    authorization = head.headers.get("authorization")
    return None if authorization is None else _token(authorization)


# Each kind asks for each request. Like `jose.peek`, it is computed once.
@lru_cache(maxsize=256)
def _token(authorization: str) -> bytes | None:
    bearer = _BEARER.fullmatch(authorization)
    return None if bearer is None else bearer[1].encode()


def claims(kind: str, head: Head, destination: Destination) -> bool:
    """Return whether `kind` has to verify the token that the head presents."""
    if kind not in destination.kinds:
        return False
    token = presented(head)
    if token is None:
        return False
    try:
        claims = jose.peek(token).claims
    except Unverified:
        return True
    issuer = claims.get("iss")
    if issuer == OWN_ISSUER:
        named, _, _ = str(claims.get("sub")).partition(":")
        return kind == named if named in OWN_KINDS else True
    known = {
        each.kind
        for each in destination.credentials
        if isinstance(each, IssuedCredential) and issuer in each.rules.issuers
    }
    return kind in known or not known
