"""Kind `jwt`: a signed token with every request, from an issuer whose public keys we hold.

Redox: JWT bearer. Which claims, algorithm and keys Redox's own tokens have is not published: all are settings.

Must not fetch a key, whatever a token names; nor take a token that lives longer than the credential allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

from receiver.errors import Unavailable, Unverified
from receiver.protocol import jose
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Destination, GoogleCredential, JwtCredential, live
from receiver.protocol.verification import bearer


class JwtKind:
    """The verifier of `jwt`."""

    name = "jwt"
    by_head = True
    credential = JwtCredential

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that matched. Raises Unverified: see `judge`, and `jwt_subject_wrong`."""
        return Verified(credentials=(self._judge(inbound.head, destination, now),), kinds=frozenset({self.name}))

    def _judge(self, head: Head, destination: Destination, now: datetime) -> int:
        return judge(head, [each for each in destination.credentials if isinstance(each, JwtCredential)], _check, now)


_Foreign = TypeVar("_Foreign", JwtCredential, GoogleCredential)

# Of several credentials that a token does not satisfy, the one that it came furthest with is told to the operator.
_PROGRESS: Final = (
    "jwt_malformed",
    "jwt_header_refused",
    "jwt_algorithm_wrong",
    "jwt_key_unknown",
    "jwt_signature_wrong",
    "jwt_claim_missing",
    "jwt_issuer_wrong",
    "jwt_audience_wrong",
    "jwt_expired",
    "jwt_not_yet_valid",
    "jwt_lives_too_long",
)


def judge(
    head: Head, credentials: Sequence[_Foreign], check: Callable[[Mapping[str, Any], _Foreign], None], now: datetime
) -> int:
    """The id of the live credential that the presented token satisfies. `check` looks at the proved claims.

    Raises Unverified: what `jose.prove` and `check` raise, `jwt_credential_missing`, `jwt_credential_expired`; and
    Unavailable where only the keys of a credential that could match are stale.
    """
    token = bearer.presented(head)
    assert token is not None
    if not credentials:
        raise Unverified("jwt_credential_missing")
    refusals: list[Unverified] = []
    stale: Unavailable | None = None
    for credential in credentials:
        if live(credential, now):
            try:
                check(jose.prove(token, credential.rules, now), credential)
            except Unverified as exc:
                refusals.append(exc)
            except Unavailable as exc:
                stale = exc
            else:
                return credential.id
    if stale is not None:
        raise stale
    if not refusals:
        raise Unverified("jwt_credential_expired")
    raise max(refusals, key=lambda exc: _PROGRESS.index(exc.reason) if exc.reason in _PROGRESS else len(_PROGRESS))


def _check(claims: Mapping[str, Any], credential: JwtCredential) -> None:
    if credential.subject is not None and claims.get("sub") != credential.subject:
        raise Unverified("jwt_subject_wrong")
