"""Verifies that a request is Redox's. One file for each kind; this one combines them as a destination requires.

A kind *claims* what a request presents in its name. If that is bad, the request is refused, whatever else it presents:
adding a credential never widens what is accepted. What no kind claims neither proves nor refuses anything. Every
failure is an `Unverified`; its reason is for the audit log only.

There must be no way through without a live credential of every kind of one required alternative, and no switch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from receiver.errors import Unverified
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Credential, Destination
from receiver.protocol.values import Value
from receiver.protocol.verification.google import GoogleKind
from receiver.protocol.verification.hmac import HmacKind
from receiver.protocol.verification.jwt import JwtKind
from receiver.protocol.verification.kind import BodyKind, CredentialKind
from receiver.protocol.verification.mtls import MtlsKind
from receiver.protocol.verification.oauth import OAuthKind
from receiver.protocol.verification.sigv4 import SigV4Kind
from receiver.protocol.verification.smart import SmartKind
from receiver.protocol.verification.token import TokenKind

__all__ = ["KINDS", "HeadProof", "check_head", "parse_require", "reason_meanings"]


# Every kind, in the order of help and lists.
KINDS: Final[dict[str, CredentialKind[Any, Any]]] = {
    kind.name: kind
    for kind in (TokenKind(), HmacKind(), JwtKind(), OAuthKind(), SmartKind(), SigV4Kind(), GoogleKind(), MtlsKind())
}

# The reasons of refusals that do not belong to one kind.
_REASONS: Final[Mapping[str, str]] = {
    "credential_missing": "no credential was presented: compare what Redox is set to send with what is required",
    "credential_insufficient": "the credentials are not sufficient: compare them with what the destination requires",
}


def reason_meanings() -> dict[str, str]:
    """Return every reason with which verification refuses a request, and its meaning for an operator."""
    return dict(_REASONS) | {reason: meaning for kind in KINDS.values() for reason, meaning in kind.reasons.items()}


def parse_require(text: Sequence[str]) -> tuple[frozenset[str], ...]:
    """Parse `["hmac+token"]` into alternatives of kinds. Raises ValueError for an unknown kind or an empty list."""
    alternatives = tuple(frozenset(alternative.split("+")) for alternative in text)
    unknown = sorted(frozenset().union(*alternatives) - KINDS.keys())
    if unknown or not alternatives:
        raise ValueError(f"unknown kind {', '.join(unknown) or '(none)'}: write {', '.join(KINDS)}, joined by +")
    return alternatives


class HeadProof(Value, frozen=True):
    """What a head proves. `sufficient`: what it presents could suffice, so that the body may be read whole.
    `authenticated`: it suffices, whatever the body is. `claims`: the proof of each kind that claims something, or the
    kind itself if it needs the body.
    """

    sufficient: bool
    authenticated: bool
    claims: tuple[Verified | BodyKind[Any, Any], ...]

    def complete(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """Return the proof, with the body. What the head proved is not checked again.

        Raises Unverified: `credential_missing`, `credential_insufficient`, or a reason of a kind.
        """
        proofs = [
            claim if isinstance(claim, Verified) else claim.verify(inbound, destination, now) for claim in self.claims
        ]
        if not proofs:
            raise Unverified("credential_missing")
        if not self.sufficient:
            raise Unverified("credential_insufficient")
        return proofs[0] if len(proofs) == 1 else _together(proofs)


def check_head(head: Head, destination: Destination, now: datetime) -> HeadProof:
    """Return what the head proves. Raises Unverified if something that it presents is already known to be bad."""
    kinds = _claiming(head, destination, now)
    claims = tuple(kind.check_head(head, destination, now) for kind in kinds)
    return HeadProof(
        _suffices({kind.name for kind in kinds}, destination),
        _suffices(frozenset().union(*(claim.kinds for claim in claims if isinstance(claim, Verified))), destination),
        claims,
    )


def _together(proofs: Sequence[Verified]) -> Verified:
    return Verified(
        credentials=tuple(chain.from_iterable(each.credentials for each in proofs)),
        kinds=frozenset().union(*(each.kinds for each in proofs)),
        nonces=tuple(chain.from_iterable(each.nonces for each in proofs)),
    )


def _claiming(head: Head, destination: Destination, now: datetime) -> list[CredentialKind[Any, Any]]:
    held = frozenset([credential for credential, until in destination.holds if until is None or now < until])
    return [kind for kind in _considered(destination.kinds, held) if kind.claims(head, destination, now)]


@lru_cache(256)
def _considered(required: frozenset[str], held: frozenset[type[Credential]]) -> tuple[CredentialKind[Any, Any], ...]:
    """Return the kinds that may claim something. A kind that is not required needs a live credential."""
    return tuple(kind for kind in KINDS.values() if kind.name in required or kind.credential in held)


def _suffices(names: AbstractSet[str], destination: Destination) -> bool:
    # An alternative without a kind would let everything in: `parse_require` makes none, and none is accepted here.
    return any(alternative and alternative <= names for alternative in destination.require)
