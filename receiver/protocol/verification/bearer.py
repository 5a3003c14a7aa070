"""Whose a signed token is that comes as `Authorization: Bearer`: each of the kinds that take one asks here.

`Authorization` is classified by shape. What is no JWT is left to the verification token. A JWT belongs to the kind that
has a credential for what it names as its issuer; one of an issuer that nobody knows, to every kind that is required,
and each refuses it. Only a kind that the destination requires claims anything: until then a token proves nothing.

May not believe a token: it is read only to find out who judges it.
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
from receiver.protocol.verification.public_keys import KeyedCredential

# The issuer of our own access tokens. No URL, and no name that another issuer has.
OURS: Final = "redox-receiver"
OWN_KINDS: Final = ("oauth", "smart")
_BEARER: Final = re.compile(r"(?i:bearer) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedCredential(KeyedCredential):
    """Tokens of an issuer, presented as Bearer. `kind` is the kind's name."""

    kind: ClassVar[str]


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
        said = jose.peek(token).claims
    except Unverified:
        return True
    issuer = said.get("iss")
    if issuer == OURS:
        named, _, _ = str(said.get("sub")).partition(":")
        return kind == named if named in OWN_KINDS else True
    known = {
        each.kind
        for each in destination.credentials
        if isinstance(each, IssuedCredential) and issuer in each.rules.issuers
    }
    return kind in known or not known
