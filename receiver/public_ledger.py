"""The ledger of the public listener. Part of the composition root (receiver.app): it knows storage and web."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.protocol.message import Nonce
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.accept.replay_guard import ReplayGuard
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.web.handler_calls import Answered
from receiver.web.token_endpoint import TokenIssue, TokenRefusal

# Status → the reason in the audit why a query was not answered.
_UNANSWERED: Final = {500: "responder_failed", 501: "responder_missing", 503: "responders_busy", 504: "responder_late"}


class PublicLedger(MessageLedger):
    """The ledger of the public listener: adds audit rows of query answers and of tokens, and the replay guard."""

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        quarantine_quota: int,
        on_commit: Callable[[Sequence[str]], None],
        no_responder: Callable[[str, str], None] = lambda _destination, _uuid: None,
    ) -> None:
        super().__init__(engine, keyring, quarantine_quota=quarantine_quota, on_commit=on_commit)
        self._seen = ReplayGuard(engine)
        self._no_responder = no_responder

    def first(self, once: Sequence[Nonce]) -> bool:
        """Mark the nonces as seen; return whether none of them was seen before. Raises Unavailable."""
        return self._seen.first(once)

    def issued(self, issue: TokenIssue) -> Future[None]:
        """Write an audit row. The future is done after the COMMIT, or raises Unavailable."""
        granted = issue.granted
        return self.record(
            AuditEvent(
                action="token.issue",
                outcome="issued",
                at=issue.head.received_at,
                actor="redox",
                peer=issue.head.peer,
                destination=issue.destination.name,
                subject=f"credentials:{granted.credential}",
                detail={"kind": granted.kind, "seconds": granted.expires_in},
            )
        )

    def not_issued(self, refusal: TokenRefusal) -> None:
        """Write an audit row later; does not wait."""
        denied, known = refusal.denied, refusal.denied.credential
        self.note(
            AuditEvent(
                action="token.refuse",
                outcome="refused",
                at=refusal.head.received_at,
                actor="unverified" if known is None else "redox",
                reason=denied.reason,
                peer=refusal.head.peer,
                destination=None if refusal.destination is None else refusal.destination.name,
                subject=None if known is None else f"credentials:{known}",
                detail={"status": denied.status},
            )
        )

    def answered(self, answered: Answered) -> Future[None]:
        """Write an audit row. The future is done after the COMMIT, or raises Unavailable.

        For a reply that discloses nothing the row is written later, and the future is done already.
        """
        disclosed = answered.status == 200
        if answered.responder is None:
            self._no_responder(answered.destination.name, answered.receipt.uuid)
        detail: dict[str, Any] = {"status": answered.status, "responder": answered.responder}
        if disclosed:
            detail |= {"length": answered.length, "digest": self._digests.content_of(answered.sha256).hex()}
        event = AuditEvent(
            action="query.answer",
            outcome="answered" if disclosed else "failed",
            at=datetime.now(UTC),
            actor="redox",
            reason=_UNANSWERED.get(answered.status),
            peer=answered.head.peer,
            destination=answered.destination.name,
            message_uuid=UUID(answered.receipt.uuid),
            detail=detail,
        )
        if disclosed:
            return self.record(event)
        self.note(event)
        noted: Future[None] = Future()
        noted.set_result(None)
        return noted
