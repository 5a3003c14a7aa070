"""Proves that a request is Redox's. One file a kind; here they are put together as a destination requires.

A kind *claims* what a request presents in its name. What it claims and finds bad refuses the request, whatever else is
presented: adding a credential never widens the door. What no kind claims proves nothing and refuses nothing. Every way
to fail is one `Unverified`; its reason is for the audit alone.

There may be no way through without a live credential of every kind of one required alternative, and no switch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from receiver.protocol.verification.kind import Kind
from receiver.protocol.verification.mtls import MtlsKind
from receiver.protocol.verification.oauth import OAuthKind
from receiver.protocol.verification.sigv4 import SigV4Kind
from receiver.protocol.verification.smart import SmartKind
from receiver.protocol.verification.token import TokenKind

__all__ = ["KINDS", "HeadProof", "Kind", "check_head", "parse_require", "reason_meanings"]


# Every kind; `--require` and whatever lists them go by this order.
KINDS: Final[dict[str, Kind[Any, Any]]] = {
    kind.name: kind
    for kind in (TokenKind(), HmacKind(), JwtKind(), OAuthKind(), SmartKind(), SigV4Kind(), GoogleKind(), MtlsKind())
}

# Why a request is refused whatever kinds it presents.
REASONS: Final[Mapping[str, str]] = {
    "credential_missing": "no credential was presented",
    "credential_insufficient": "what was presented is right, and the destination requires more",
}


def reason_meanings() -> dict[str, str]:
    """Every reason with which verification refuses a request, and what it means to an operator."""
    return dict(REASONS) | {reason: says for kind in KINDS.values() for reason, says in kind.reasons.items()}


def parse_require(text: Sequence[str]) -> tuple[frozenset[str], ...]:
    """`["hmac+token"]` as alternatives of kinds. Raises ValueError on an unknown kind, or without an alternative."""
    alternatives = tuple(frozenset(alternative.split("+")) for alternative in text)
    unknown = sorted(frozenset().union(*alternatives) - KINDS.keys())
    if unknown or not alternatives:
        raise ValueError(f"unknown kind {', '.join(unknown) or '(none)'}: write {', '.join(KINDS)}, joined by +")
    return alternatives


class HeadProof(Value, frozen=True):
    """What a head proves. `sufficient`: what it presents could suffice, so that the body may be read whole.
    `authenticated`: it suffices, whatever the body is. `claims`: the kinds it presents, each with what it proved; None
    where the kind needs the body too.
    """

    sufficient: bool
    authenticated: bool
    claims: tuple[tuple[Kind[Any, Any], Verified | None], ...]

    def complete(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The proof, with the body. What the head has proved is not proved again.

        Raises Unverified: `credential_missing`, `credential_insufficient`, or what a kind found.
        """
        proofs = [kind.verify(inbound, destination, now) if proof is None else proof for kind, proof in self.claims]
        if not proofs:
            raise Unverified("credential_missing")
        if not self.sufficient:
            raise Unverified("credential_insufficient")
        return proofs[0] if len(proofs) == 1 else _together(proofs)


def check_head(head: Head, destination: Destination, now: datetime) -> HeadProof:
    """What the head proves. Raises Unverified when something presented is already seen to be bad."""
    claims: list[tuple[Kind[Any, Any], Verified | None]] = []
    for kind in _claimed(head, destination, now):
        if kind.by_head:
            claims.append((kind, kind.verify(Inbound(head=head, body=b""), destination, now)))
        else:
            kind.screen(head, destination, now)
            claims.append((kind, None))
    return HeadProof(
        _suffices({kind.name for kind, _ in claims}, destination),
        _suffices({kind.name for kind, proof in claims if proof is not None}, destination),
        tuple(claims),
    )


def _together(proofs: Sequence[Verified]) -> Verified:
    return Verified(
        credentials=tuple(chain.from_iterable(each.credentials for each in proofs)),
        kinds=frozenset().union(*(each.kinds for each in proofs)),
        nonces=tuple(chain.from_iterable(each.nonces for each in proofs)),
    )


def _claimed(head: Head, destination: Destination, now: datetime) -> list[Kind[Any, Any]]:
    held = frozenset([credential for credential, until in destination.holds if until is None or now < until])
    return [kind for kind in _known(destination.kinds, held) if kind.claims(head, destination, now)]


@lru_cache(256)
def _known(required: frozenset[str], held: frozenset[type[Credential]]) -> tuple[Kind[Any, Any], ...]:
    """The kinds that a destination knows of. One that nothing requires is forgotten with its last live credential."""
    return tuple(kind for kind in KINDS.values() if kind.name in required or kind.credential in held)


def _suffices(names: Collection[str], destination: Destination) -> bool:
    # An alternative of no kinds would be a door without a lock: `parse_require` makes none, and none is honoured.
    return any(alternative and alternative.issubset(names) for alternative in destination.require)
