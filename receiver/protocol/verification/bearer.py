"""Whose a signed token is that comes as `Authorization: Bearer`: each of the kinds that take one asks here.

`Authorization` is classified by shape. Anything but a JWT is left to the verification token. A JWT belongs to the kind
that has a credential for what it names as its issuer; one of an issuer that nobody knows, to every kind that is
required, and each refuses it. Only a kind that the destination requires claims anything: until then a token proves
nothing.

Must not believe a token: it is read only to find out who judges it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from receiver.errors import Unverified
from receiver.protocol import jose
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination, GoogleCredential, JwtCredential

# The issuer of our own access tokens. No URL, and no name that another issuer has.
OURS: Final = "redox-receiver"
OWN_KINDS: Final = ("oauth", "smart")
_BEARER: Final = re.compile(r"(?i:bearer) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)", re.ASCII)
_FOREIGN: Final[dict[str, type[JwtCredential | GoogleCredential]]] = {"jwt": JwtCredential, "google": GoogleCredential}


def presented(head: Head) -> bytes | None:
    """The token, when one that has the shape of a JWT is presented."""
    authorization = head.headers.get("authorization")
    return None if authorization is None else _token(authorization)


# Asked several times for each request, by each kind: as `jose.peek`, it is looked at once.
@lru_cache(maxsize=256)
def _token(authorization: str) -> bytes | None:
    bearer = _BEARER.fullmatch(authorization)
    return None if bearer is None else bearer[1].encode()


def claims(kind: str, head: Head, destination: Destination) -> bool:
    """Whether `kind` is to judge what the head presents."""
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
    if issuer == OURS:
        named, _, _ = str(claims.get("sub")).partition(":")
        return kind == named if named in OWN_KINDS else True
    return _knows(kind, issuer, destination) or not any(_knows(each, issuer, destination) for each in _FOREIGN)


def _knows(kind: str, issuer: object, destination: Destination) -> bool:
    """Whether a credential of that kind names the issuer."""
    foreign = _FOREIGN.get(kind)
    if foreign is None:
        return False
    return any(isinstance(each, foreign) and issuer in each.rules.issuers for each in destination.credentials)
