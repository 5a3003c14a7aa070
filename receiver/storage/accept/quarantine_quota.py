"""The quarantine quota: how many bytes the quarantine of a destination may hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import structlog

from receiver.errors import Unavailable
from receiver.states import MessageState
from receiver.storage.accept.batch import BatchWriter
from receiver.storage.accept.message_builder import PendingMessage
from receiver.storage.accept.sql import MIN_QUARANTINED_SIZE

log: Final = structlog.get_logger(__name__)

# The maximum age, in seconds, of the sum of quarantined bytes that is compared with the quota.
_QUOTA_AGE: Final = 5.0


class QuarantineQuota:
    """The quarantine limit in bytes for each destination. Beyond it, Redox must keep what it sends. Not thread-safe."""

    def __init__(self, recorder: BatchWriter, limit: int) -> None:
        self._recorder = recorder
        self._limit = limit
        self._held: dict[int, tuple[float, int]] = {}

    def within_quota(self, entries: Sequence[PendingMessage]) -> list[PendingMessage]:
        """Return the entries within the quota. The others fail."""
        kept = []
        for entry in entries:
            refusal = self._refusal(entry) if entry.row["state"] == MessageState.QUARANTINED else None
            if refusal is None:
                kept.append(entry)
            else:
                entry.fail(refusal)
        return kept

    def _refusal(self, entry: PendingMessage) -> str | None:
        destination = entry.row["destination_id"]
        asked, held = self._held.get(destination, (float("-inf"), 0))
        if time.monotonic() - asked > _QUOTA_AGE:
            try:
                asked, held = time.monotonic(), self._recorder.quarantined(destination)
            except Unavailable as exc:
                return str(exc)
        held += max(entry.row["size"], MIN_QUARANTINED_SIZE)
        if held > self._limit:
            log.error("quarantine.full", destination=entry.admitted.destination.name)
            return "quarantine_full"
        self._held[destination] = asked, held
        return None
