"""Whose a signed token is that comes as `Authorization: Bearer`: each of the kinds that take one asks here.

`Authorization` is classified by shape. What is no JWT is left to the verification token. A JWT belongs to the kind that
has a credential for what it names as its issuer; one of an issuer that nobody knows, to every kind that is required,
and each refuses it. Only a kind that the destination requires claims anything: until then a token proves nothing.

May not believe a token: it is read only to find out who judges it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final

from receiver.errors import Unverified
from receiver.protocol import jose
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination, GoogleCredential, JwtCredential

# The issuer of our own access tokens. No URL, and no name that another issuer has.
OURS: Final = "redox-receiver"
OWN_KINDS: Final = ("oauth", "smart")
_BEARER: Final = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_FOREIGN: Final = {"jwt": JwtCredential, "google": GoogleCredential}


def presented(head: Head) -> bytes | None:
    """The token, when one that has the shape of a JWT is presented."""
    authorization = head.header("authorization")
    bearer = None if authorization is None else _BEARER.fullmatch(authorization)
    return bearer[1] if bearer is not None and jose.shaped(bearer[1]) else None


def required(kind: str, destination: Destination) -> bool:
    """Whether some alternative of the destination's needs this kind."""
    return any(kind in alternative for alternative in destination.require)


def claims(kind: str, head: Head, destination: Destination) -> bool:
    """Whether `kind` is to judge what the head presents."""
    if not required(kind, destination):
        return False
    token = presented(head)
    if token is None:
        return False
    owners = _owners(token, destination)
    return kind in owners or not owners


def _owners(token: bytes, destination: Destination) -> Collection[str]:
    """The kinds that the token is for; none when nobody knows its issuer, or it can't be read."""
    try:
        said = jose.peek(token).claims
    except Unverified:
        return ()
    issuer = said.get("iss")
    if issuer == OURS:
        kind, _, _ = str(said.get("sub")).partition(":")
        return (kind,) if kind in OWN_KINDS else ()
    return [kind for kind in _FOREIGN if any(issuer in each.rules.issuers for each in _of(kind, destination))]


def _of(kind: str, destination: Destination) -> Iterator[Any]:
    return (each for each in destination.credentials if isinstance(each, _FOREIGN[kind]))
