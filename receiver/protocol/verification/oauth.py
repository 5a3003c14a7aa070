"""Kinds `oauth` and `smart`: an access token that our own token endpoint issued (receiver.protocol.tokens).

A JWT after RFC 9068, signed with a key that nobody else has and that no key set publishes. It is good at one
destination, for the credential that asked for it, and no longer than that credential: who revokes it ends its tokens.

Must not tell more of a token than whether it is good.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final

import jwt

from receiver.errors import Unverified
from receiver.protocol import jose
from receiver.protocol.jose import Rules, VerifyingKey
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import MAX_ACCESS_LIFETIME, Destination, OAuthCredential, SmartCredential, live
from receiver.protocol.verification import bearer

ALGORITHM: Final = "HS256"
# RFC 9068 2.1.
_TYPE: Final = "at+jwt"

OwnCredential = OAuthCredential | SmartCredential


class OAuthKind:
    """The verifier of `oauth`, or of `smart`: they differ in how the client proves itself to the token endpoint."""

    by_head = True

    def __init__(self, name: str, credential: type[OwnCredential]) -> None:
        self.name = name
        self.credential = credential

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that asked for the token.

        Raises Unverified: what `jose.prove` raises, `jwt_type_wrong`, `jwt_credential_missing`,
        `jwt_credential_expired`.
        """
        return Verified(credentials=(self._judge(inbound.head, destination, now),), kinds=frozenset({self.name}))

    def _judge(self, head: Head, destination: Destination, now: datetime) -> int:
        token = bearer.presented(head)
        assert token is not None
        presented = jose.peek(token)
        if presented.header.get("typ") != _TYPE:
            raise Unverified("jwt_type_wrong")
        named = [
            each
            for each in destination.credentials
            if isinstance(each, self.credential) and presented.claims.get("sub") == _subject(each)
        ]
        if not named:
            raise Unverified("jwt_credential_missing")
        credential = named[0]
        jose.prove(token, _rules(destination.id, credential.token_keys), now)
        if not live(credential, now):
            raise Unverified("jwt_credential_expired")
        return credential.id


def issue(
    credential: OwnCredential, destination: Destination, now: datetime, *, scopes: Sequence[str], jti: str
) -> str:
    """A new access token (RFC 9068 2.2). `jti` is a name never used before."""
    issued = int(now.timestamp())
    claims = {
        "iss": bearer.OURS,
        "sub": _subject(credential),
        "aud": _audience(destination.id),
        "iat": issued,
        "exp": issued + credential.client.lifetime,
        "jti": jti,
        "client_id": credential.client.client_id,
    }
    if scopes:
        claims["scope"] = " ".join(scopes)
    key = credential.token_keys[0]
    assert isinstance(key.key, bytes)
    return jwt.encode(claims, key.key, algorithm=ALGORITHM, headers={"typ": _TYPE, "kid": key.kid})


def _subject(credential: OwnCredential) -> str:
    return f"{'oauth' if isinstance(credential, OAuthCredential) else 'smart'}:{credential.id}"


def _audience(destination: int) -> str:
    return f"{bearer.OURS}:destination:{destination}"


# Rules are told apart by identity (jose): the same ones for a destination and its keys, as long as those are the same.
@lru_cache(maxsize=1024)
def _rules(destination: int, keys: tuple[VerifyingKey, ...]) -> Rules:
    return Rules(
        issuers=(bearer.OURS,),
        audiences=(_audience(destination),),
        algorithms=frozenset({ALGORITHM}),
        keys=keys,
        lifetime=MAX_ACCESS_LIFETIME,
        leeway=0,
    )
