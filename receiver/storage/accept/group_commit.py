"""Group commit: one thread for each process writes what is queued in one transaction, and answers after the COMMIT.

A watchdog thread answers requests that have waited too long, and closes the connection to a frozen server.

Must not decide about messages: each arrives with its verdict. Start it after fork.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from receiver.errors import Unavailable
from receiver.fault_injection.faults import point
from receiver.metrics.counters import observe_batch
from receiver.storage.accept.batch import BatchWriter, UnwritableRow
from receiver.storage.accept.last_used import LastUsed
from receiver.storage.accept.message_builder import (
    UNSTORABLE,
    MessageBuilder,
    PendingAudit,
    PendingMessage,
    fold,
    resolve_future,
)
from receiver.storage.accept.quarantine_quota import QuarantineQuota
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.flood_control import FloodControl

log: Final = structlog.get_logger(__name__)

_committed, _answered = point("ledger.committed"), point("ledger.answered")

# A request is answered within five seconds, with 503 if necessary.
COMMIT_TIMEOUT: Final = 4.0
_WATCH_INTERVAL: Final = 0.2
# Limits of a batch: more rows save nothing, and delay their answers.
BATCH_ROWS: Final = 64
BATCH_BYTES: Final = 16 * 1024 * 1024
# Limits of the queue: beyond these, new requests are refused.
QUEUE_ROWS: Final = 1_000
QUEUE_BYTES: Final = 256 * 1024 * 1024
# Refusals kept while the database is unavailable. Further ones are only counted.
EVENTS: Final = 10_000
_MAX_EVENTS_AT_ONCE: Final = 1_000
# Refusals and handshakes are in the audit log within a second.
_FLUSH_INTERVAL: Final = 0.5
# During a stop: seconds between two attempts to write refusals that the database did not accept.
_RETRY_INTERVAL: Final = 0.2


class GroupCommitWriter:
    """Queues, writes and answers messages and audit rows. `start` and `stop` delimit its lifetime. Thread-safe."""

    def __init__(
        self,
        recorder: BatchWriter,
        entries: MessageBuilder,
        *,
        quarantine_quota: int,
        on_commit: Callable[[Sequence[str]], None],
    ) -> None:
        self._recorder = recorder
        self._entries = entries
        self._on_commit = on_commit
        self._quota = QuarantineQuota(recorder, quarantine_quota)

        # The queues, under the lock.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: deque[PendingMessage] = deque()
        self._waiting_bytes = 0
        self._urgent: deque[PendingAudit] = deque()
        self._flood = FloodControl()
        self._events: deque[AuditEvent] = deque()
        self._used = LastUsed(recorder)
        self._hastened = self._stopping = self._refused = False
        self._give_up_at = float("inf")

        # The batch being written, for the watchdog.
        self._busy: tuple[float, Sequence[PendingMessage | PendingAudit]] | None = None
        self._flushed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="ledger-watchdog", daemon=True)

    def start(self) -> None:
        """Start the threads. Call it after fork: threads and sockets do not survive one."""
        self._thread.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Write what is queued, then stop. Later calls raise Unavailable.

        Refusals that the database does not accept at first are retried for COMMIT_TIMEOUT seconds, then dropped.
        """
        with self._lock:
            self._stopping = True
            self._give_up_at = time.monotonic() + COMMIT_TIMEOUT
            self._wake.notify()
        self._thread.join(2 * COMMIT_TIMEOUT)

    def put(self, entry: PendingMessage) -> None:
        """Queue the entry. Its future is done when it is written, or fails. See `flush`."""
        size = entry.row["size"]
        with self._lock:
            refusal = None
            if self._stopping:
                refusal = "shutting_down"
            elif len(self._waiting) >= QUEUE_ROWS or self._waiting_bytes + size > QUEUE_BYTES:
                refusal = "queue_full"
            else:
                self._waiting.append(entry)
                self._waiting_bytes += size
                self._used.note(entry.row["credential_ids"], entry.row["received_at"])
        if refusal is not None:
            entry.fail(refusal)

    def flush(self) -> None:
        """Write the batch now. Until then entries collect, so that concurrent requests share one commit."""
        with self._lock:
            if self._waiting and not self._hastened:
                self._hastened = True
                self._wake.notify()

    def put_urgent(self, urgent: PendingAudit) -> None:
        """Queue an audit row that a caller waits for."""
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._urgent.append(urgent)
                self._wake.notify()
        if stopping:
            urgent.fail("shutting_down")

    def note(self, audit_event: AuditEvent) -> None:
        """Queue an audit row that no caller waits for. In a flood it is only counted."""
        with self._lock:
            self._events += self._flood.take(audit_event, time.monotonic(), room=len(self._events) < EVENTS)

    # --- the writer thread

    def _run(self) -> None:
        last = False
        while not last:
            entries, urgent, events, last = self._take()
            self._busy = time.monotonic(), (*entries, *urgent)
            try:
                self._write(fold(self._quota.within_quota(entries)), urgent, events)
                self._used.flush(last)
            except Exception as exc:  # noqa: BLE001 - the writer outlives whatever a batch does to it
                log.error("ledger.failed", error=type(exc).__name__)
                self._recorder.close()
                _fail("ledger_failed", entries, urgent)
            finally:
                self._busy = None
            with self._lock:
                last = last and not self._events  # those that were put back
        self._recorder.close()

    def _take(self) -> tuple[list[PendingMessage], list[PendingAudit], list[AuditEvent], bool]:
        """Return the queued entries (bounded in rows and bytes), the refusals that are due, and whether it is the last
        batch.
        """
        with self._lock:
            if not (self._hastened or self._urgent or self._stopping):
                self._wake.wait(_FLUSH_INTERVAL)
            elif self._refused and not (self._waiting or self._urgent):
                self._wake.wait(_RETRY_INTERVAL)
            self._refused = False
            entries: list[PendingMessage] = []
            size = 0
            while (
                self._waiting
                and len(entries) < BATCH_ROWS
                and (not entries or size + self._waiting[0].row["size"] <= BATCH_BYTES)
            ):
                entries.append(self._waiting.popleft())
                size += entries[-1].row["size"]
            self._waiting_bytes -= size
            self._hastened = bool(self._waiting)
            urgent = [self._urgent.popleft() for _ in range(min(len(self._urgent), BATCH_ROWS))]
            events = self._due_events()
            return entries, urgent, events, self._stopping and not (self._waiting or self._urgent or self._events)

    def _due_events(self) -> list[AuditEvent]:
        now = time.monotonic()
        if not self._stopping and now - self._flushed < _FLUSH_INTERVAL:
            return []
        self._flushed = now
        if self._stopping:
            self._events += self._flood.end(now)
        elif len(self._events) < EVENTS:
            self._events += self._flood.due(now)
        return [self._events.popleft() for _ in range(min(len(self._events), _MAX_EVENTS_AT_ONCE))]

    def _write(
        self, entries: Sequence[PendingMessage], urgent: Sequence[PendingAudit], events: Sequence[AuditEvent]
    ) -> None:
        """Write all of it in one commit and answer. If one row makes the batch fail, write each entry separately."""
        if not entries and not urgent and not events:
            return
        try:
            recorded = self._recorder.record(entries, [*events, *(each.event for each in urgent)])
        except Unavailable as exc:
            _fail(str(exc), entries, urgent)
            self._put_back(events)
        except UnwritableRow:
            self._write_apart(entries, urgent, events)
        else:
            if entries:
                observe_batch(len(entries))
            _committed()
            for entry, receipt in zip(entries, recorded.receipts, strict=True):
                entry.answer(receipt)
            for each in urgent:
                resolve_future(each.future, None)
            for event in recorded.counted:
                self.note(event)
            _answered()
            if recorded.lanes:
                self._hint(recorded.lanes)

    def _write_apart(
        self, entries: Sequence[PendingMessage], urgent: Sequence[PendingAudit], events: Sequence[AuditEvent]
    ) -> None:
        """Write each entry separately, so that only the row that the database refuses fails."""
        if len(entries) + len(urgent) + len(events) > 1:
            for entry in entries:
                self._write([entry], [], [])
            for each in urgent:
                self._write([], [each], [])
            for event in events:
                self._write([], [], [event])
        elif entries and entries[0].row["quarantine_reason"] != UNSTORABLE:
            # The database refuses its metadata columns. Its exact bytes can still be kept.
            log.error("ledger.unstorable", uuid=str(entries[0].row["uuid"]))
            self._entries.without_metadata(entries[0])
            self._write(entries, [], [])
        else:
            log.error("ledger.row_refused", action=events[0].action if events else None)
            _fail("row_refused", entries, urgent)

    def _put_back(self, events: Sequence[AuditEvent]) -> None:
        """Keep the refusals for a later attempt; during a stop, only for a moment."""
        if not events:
            return
        with self._lock:
            self._events.extendleft(reversed(events))
            self._refused = self._stopping
            if time.monotonic() >= self._give_up_at:
                log.error("ledger.refusals_lost", count=sum(each.count for each in self._events))
                self._events.clear()

    def _hint(self, lanes: Sequence[str]) -> None:
        try:
            self._on_commit(lanes)
        except Exception as exc:  # noqa: BLE001 - a hint that is lost is made good by the workers' sweep
            log.warning("ledger.hint_lost", error=type(exc).__name__)

    # --- the watchdog thread

    def _watch(self) -> None:
        """Answer requests that have waited too long, and cut the connection to a server that does not answer."""
        while self._thread.is_alive() or not self._stopping:
            time.sleep(_WATCH_INTERVAL)
            late = time.monotonic() - COMMIT_TIMEOUT
            began, in_hand = self._busy or (late, ())
            _fail("timed_out", self._overdue(late), [each for each in in_hand if each.enqueued < late])
            if began < late:
                self._recorder.cut()

    def _overdue(self, late: float) -> list[PendingMessage | PendingAudit]:
        """Remove from the queues, and return, what has waited since before `late`."""
        overdue: list[PendingMessage | PendingAudit] = []
        with self._lock:
            while self._waiting and self._waiting[0].enqueued < late:
                entry = self._waiting.popleft()
                self._waiting_bytes -= entry.row["size"]
                overdue.append(entry)
            while self._urgent and self._urgent[0].enqueued < late:
                overdue.append(self._urgent.popleft())
        return overdue


def _fail(reason: str, *groups: Sequence[PendingMessage | PendingAudit]) -> None:
    for group in groups:
        for each in group:
            each.fail(reason)
