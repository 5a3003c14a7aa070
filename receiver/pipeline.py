"""The pipeline: verify → parse → check the source → record → reply.

Two calls, both pure: `check_head` decides whether and how much of a request's body may be read; `judge` returns the
verdict. The endpoint (receiver.web.endpoint) reads the request, carries out the verdict, and awaits `Ledger.accept`.

Must not import anything of ours but receiver.protocol and receiver.errors: no framework, no database.

What Redox does with a reply (Redox: delivery rules): after 200 the next message follows; after 400 and above, or
without a reply, the whole feed pauses and Redox sends the same message again. So a 4xx is only for requests that are
not proved to be Redox's or not allowed, and 503 only for what cannot be recorded now.

| verdict     | what the endpoint does                                                 | status              |
|-------------|------------------------------------------------------------------------|---------------------|
| Refused     | audit (reason, peer, length, digest), never the body                   | 400 401 403 405 413 |
| Challenged  | audit; the challenge as text/plain                                     | 200                 |
| Admitted    | one commit, then 200; a query is answered by its responder             | 200 503 (500 501 504) |
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, Protocol

from receiver.errors import BadTransfer, Refusal, UnknownSource, Unreadable, Unverified
from receiver.protocol import challenge, sources, verification
from receiver.protocol.message import Head, Inbound, ParsedMessage, Verified
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination, Registry
from receiver.protocol.values import Value
from receiver.protocol.verification.token import bearer, match_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A request that is refused.

    `verified`, `claimed_source` and `query` are set only if it is proved to be Redox's. `claimed_source` is the text in
    the message: store only a digest of one that does not have the form of an id (`sources.ID_SHAPE`). `query` is the
    kind of a query, whose reply has Redox's form of an error. `body`, if one was read, is for its length and digest; it
    must not be stored.
    """

    reason: str
    status: int
    head: Head
    destination: Destination | None
    verified: Verified | None = None
    claimed_source: str | None = field(default=None, repr=False)
    query: str | None = None
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenged:
    """A handshake with the right token. `challenge` is safe to echo."""

    challenge: str = field(repr=False)
    head: Head
    destination: Destination
    credential: int


class Admitted(Value, frozen=True, kw_only=True):
    """An authentic message that is to be recorded.

    `message` is None if the body could not be parsed; then `quarantine` is the reason. `quarantine` is also set if a
    policy holds the message back. `query` is the kind of a query, whose sender waits for the answer.
    """

    inbound: Inbound
    destination: Destination
    verified: Verified
    message: ParsedMessage | None
    quarantine: str | None
    query: str | None


Verdict = Refused | Challenged | Admitted


class Receipt(Value, frozen=True, kw_only=True):
    """The result of recording an admitted message, after its COMMIT. `message_id` is the row's id."""

    message_id: int
    uuid: str
    outcome: Literal["accepted", "duplicate", "quarantined", "unhandled"]
    inline: tuple[int, ...] = ()  # deliveries that must succeed before the reply (acknowledge="after_handling")


class Ledger(Protocol):
    """What the endpoint needs of the storage."""

    def accept(self, admitted: Admitted, *, batch: bool = False) -> Future[Receipt]:
        """Record in one commit. The future raises receiver.errors.Unavailable if that is not possible now.

        `batch`: it may wait for others to share the commit, until `flush`.
        """

    def flush(self) -> None:
        """Write the batch now: its requests wait."""

    def refuse(self, refused: Refused) -> None:
        """Write an audit row of a refusal later; does not wait."""

    def unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool) -> None:
        """Write an audit row of a 503 later; does not wait. `proved`: the request is known to be Redox's."""

    def challenged(self, challenged: Challenged) -> None:
        """Write an audit row of a handshake later; does not wait."""


# Bytes that are read of a body without a credential in its head: enough for a handshake.
UNPROVED_BODY: Final = challenge.MAX_HANDSHAKE


class HeadAccepted(Value, frozen=True):
    """A head that `check_head` has accepted.

    `whole`: the body may be read whole; otherwise at most UNPROVED_BODY bytes, because it can only be a handshake.
    `authenticated`: the head authenticates any body: a token does, a signature over the body does not.
    """

    head: Head
    destination: Destination
    proof: verification.HeadProof | None

    @property
    def whole(self) -> bool:
        return self.proof is not None and self.proof.sufficient

    @property
    def authenticated(self) -> bool:
        return self.proof is not None and self.proof.authenticated

    def missing(self) -> Refused:
        """The verdict on a body larger than UNPROVED_BODY whose head has no sufficient credential."""
        return _refused(Unverified("credential_missing"), self.head, self.destination)

    def not_received(self, exc: BadTransfer) -> Refused:
        """The verdict on a body that failed to arrive."""
        return _refused(exc, self.head, self.destination)


def check_head(head: Head, registry: Registry, now: datetime) -> HeadAccepted | Refused:
    """Judge the head, before the body is read."""
    destination = registry.destinations.get(head.destination)
    if destination is None or not destination.enabled:
        return Refused(
            reason="destination_unknown" if destination is None else "destination_disabled",
            status=Unverified.status_hint,
            head=head,
            destination=destination,
        )
    if head.method == "GET":
        return HeadAccepted(head, destination, None)
    try:
        return HeadAccepted(head, destination, verification.check_head(head, destination, now))
    except Unverified as exc:
        return _refused(exc, head, destination)


def judge(accepted: HeadAccepted, body: bytes, now: datetime) -> Verdict:
    """The verdict on a whole request, whose head was accepted with the same `now`. A GET's body is ignored."""
    head, destination, proof = accepted.head, accepted.destination, accepted.proof
    inbound = Inbound(head=head, body=body)
    verified = None
    try:
        if proof is None:
            return _handshake(challenge.from_query(head), head, destination, now)
        handshake = challenge.from_body(body)
        try:
            if handshake is not None:
                return _handshake(handshake, head, destination, now)
        except Refusal:
            # If the head could suffice, it may be a message of an unknown form: if it verifies, it is stored.
            if not proof.sufficient:
                raise
        verified = proof.complete(inbound, destination, now)
        return _admit(inbound, destination, verified)
    except Refusal as exc:
        return _refused(exc, head, destination, verified=verified, body=body)


def replayed(admitted: Admitted) -> Refused:
    """The verdict on a query with a repeated signature: its first sender has the answer."""
    return Refused(
        reason="signature_replayed",
        status=Unverified.status_hint,
        head=admitted.inbound.head,
        destination=admitted.destination,
        body=admitted.inbound.body,
    )


def _handshake(handshake: challenge.Handshake, head: Head, destination: Destination, now: datetime) -> Challenged:
    """Judge a handshake by its token alone, whatever `require` is: Redox's dashboard sends nothing else.

    The token may be in the header, in the handshake, or else the Bearer value. If it is in the first two, both must be
    right.
    """
    presented = [token for token in (head.header("verification-token"), handshake.token) if token is not None]
    if not presented and (token := bearer(head)) is not None:
        presented = [token]
    if not presented:
        raise Unverified("credential_missing")
    credential, *_ = [match_token(token, destination, now) for token in presented]
    return Challenged(challenge=handshake.answer(), head=head, destination=destination, credential=credential)


def _admit(inbound: Inbound, destination: Destination, verified: Verified) -> Verdict:
    try:
        message = read(inbound.body)
    except Unreadable as exc:
        return Admitted(
            inbound=inbound,
            destination=destination,
            verified=verified,
            message=None,
            quarantine=exc.reason,
            query=exc.query,
        )
    query = message.kind if message.query else None
    try:
        quarantine = sources.admit(message, destination)
    except UnknownSource as exc:
        return _refused(
            exc,
            inbound.head,
            destination,
            verified=verified,
            body=inbound.body,
            claimed_source=message.source_id,
            query=query,
        )
    return Admitted(
        inbound=inbound, destination=destination, verified=verified, message=message, quarantine=quarantine, query=query
    )


def _refused(
    exc: Refusal,
    head: Head,
    destination: Destination | None,
    *,
    verified: Verified | None = None,
    claimed_source: str | None = None,
    query: str | None = None,
    body: bytes | None = None,
) -> Refused:
    return Refused(
        reason=exc.reason,
        status=exc.status_hint,
        head=head,
        destination=destination,
        verified=verified,
        claimed_source=claimed_source,
        query=query,
        body=body,
    )
