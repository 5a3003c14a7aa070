"""Flood control of the audit log: passes the first events of a minute, and sums up the rest.

Must not write.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from msgspec import structs

from receiver.storage.evidence.audit_log import AUTHENTIC_REASONS, AuditEvent
from receiver.window_counter import MINUTE, WindowCounter

# Flood limits: this many rows a minute for one action, destination, reason and network, and for all together. The total
# is kept separately for strangers and for holders of a credential, so that neither hides the other. Further events are
# counted into one row a minute each. The allowance of strangers shrinks (see FloodControl).
ROWS_EACH: Final = 10
ROWS_IN_ALL: Final = 300
# This many sources and messages a minute are named among the counted events.
NAMED: Final = 100
# This many repeats of messages a minute get their own row, in the commit that answers them, for one destination.
REPEATS: Final = 100
# Strangers who use up their allowance get half of it in the next minute, down to summary rows alone. They get all of it
# back after this many seconds without doing so.
_RESTORE_AFTER: Final = 3600.0
# How many names are remembered, to recognize those that return. A made-up name comes once.
_NAMES: Final = 50_000
_MANY: Final = "many"


@lru_cache(1024)
def network(peer: str) -> str:
    """Return the network under which a flood is counted: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ip_address(peer)
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        # A dual-stack socket gives IPv4 peers in this form (RFC 4291 2.5.5.2).
        return str(address.ipv4_mapped or f"{IPv6Address(int(address) >> 64 << 64)}/64")
    return str(address)


@dataclass(frozen=True, slots=True)
class _EventKey:
    """The key of a count. `named`: the source or message of the event; `several`: there are too many to name."""

    action: str
    destination: str | None
    reason: str | None
    peer: str
    query: bool
    several: bool
    named: str | None = None


class FloodControl:
    """Passes the first events of a minute as they are and sums up the rest. Not thread-safe.

    Strangers who continue for minutes get fewer rows each minute, because rows are kept forever. Times are seconds of a
    monotonic clock.
    """

    def __init__(self) -> None:
        self._halvings = 0
        self._used_up_at = 0.0  # end of the last minute in which strangers used up their allowance
        self._begin(0.0)
        self._names: OrderedDict[int, None] = OrderedDict()

    def take(self, event: AuditEvent, now: float, *, room: bool) -> list[AuditEvent]:
        """Return the rows to write for this event and for an ended minute. Without `room` the event is only counted."""
        due = self.due(now) if room else []
        named = _named(event)
        back = named is not None and self._seen_before(hash((event.action, event.destination, named)))
        query = "query" in (event.detail or {})
        key = _EventKey(
            event.action, event.destination, event.reason, network(event.peer or ""), query, named is not None
        )
        these = self._classes[event.actor != "unverified" or event.reason in AUTHENTIC_REASONS]
        if room and these.passes(key):
            due.append(event)
        else:
            these.count(key, named if back else None, event)
        return due

    def due(self, now: float) -> list[AuditEvent]:
        """Return the summary rows of an ended minute, and begin the next."""
        return self.end(now) if self._classes[False].ended(now) else []

    def end(self, now: float) -> list[AuditEvent]:
        """Return all summary rows so far: at the end of a minute, and before the process ends."""
        events = [each for proved in self._classes.values() for each in proved.summed()]
        if self._classes[False].used_up:
            self._halvings, self._used_up_at = self._halvings + 1, now
        elif now - self._used_up_at >= _RESTORE_AFTER:
            self._halvings = 0
        self._begin(now)
        return events

    def _begin(self, now: float) -> None:
        self._classes = {False: _Class(now, self._halvings), True: _Class(now, 0)}

    def _seen_before(self, name: int) -> bool:
        """Return whether that name was seen recently."""
        known = name in self._names
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > _NAMES:
            self._names.popitem(last=False)
        return known


class _Class:
    """The events of strangers, or of others, within the minute that `began`. `halvings`: how often their allowance was
    halved.
    """

    def __init__(self, began: float, halvings: int) -> None:
        self._each, self._in_all, self._names = (most >> halvings for most in (ROWS_EACH, ROWS_IN_ALL, NAMED))
        self._seen = 0
        self._passed: WindowCounter[_EventKey] = WindowCounter(MINUTE, began=began)
        self._held: dict[_EventKey, tuple[AuditEvent, int]] = {}
        self._named = 0

    def passes(self, key: _EventKey) -> bool:
        """Return whether one more event gets its own row."""
        passes = self._passed[key] < self._each and self._passed.total < self._in_all
        self._seen += 1
        if passes:
            self._passed.add(key)
        return passes

    def ended(self, now: float) -> bool:
        """Return whether the minute is over."""
        return self._passed.ended(now)

    def count(self, key: _EventKey, named: str | None, event: AuditEvent) -> None:
        """Count one more event, by its name if there is one."""
        key = self._count_key(key, named)
        self._held[key] = event, self._held[key][1] + event.count if key in self._held else event.count

    def _count_key(self, key: _EventKey, named: str | None) -> _EventKey:
        """Return the key to count the event under. Destinations and reasons are few, so keys are few."""
        if named is not None:
            precise = replace(key, named=named, several=False)
            if precise in self._held:
                return precise
            if self._named < self._names:
                self._named += 1
                return precise
        if key in self._held or len(self._held) < self._in_all:
            return key
        # Too many addresses: only their total is kept.
        return replace(key, peer=_MANY)

    @property
    def used_up(self) -> bool:
        """Return whether there was more than in a quiet minute. A single request does not prolong the effect of a
        flood.
        """
        return bool(self._held) and self._seen > ROWS_EACH

    def summed(self) -> list[AuditEvent]:
        """Return one row for each key, with the last event's time and without the fields that differed."""
        return [_summed(key, event, count) for key, (event, count) in self._held.items()]


def _summed(key: _EventKey, event: AuditEvent, count: int) -> AuditEvent:
    detail: dict[str, Any] = ({"several": True} if key.several else _source(event)) | (
        {"query": True} if key.query else {}
    )
    return structs.replace(
        event,
        peer=key.peer,
        count=count,
        subject=None,
        note=None,
        detail=detail or None,
        message_uuid=None if key.named is None else event.message_uuid,
    )


def _source(event: AuditEvent) -> dict[str, Any]:
    """Return the part of the detail that names a refused source (see MessageLedger.refuse)."""
    return {name: value for name, value in (event.detail or {}).items() if name in ("source", "source_digest")}


def _named(event: AuditEvent) -> str | None:
    """Return the source, or else the message, of the event."""
    source = next(filter(None, _source(event).values()), None)
    return source or (None if event.message_uuid is None else str(event.message_uuid))


class Repeats:
    """Decides which repeats of messages get their own row. Not thread-safe.

    A repeat that changed something always gets one.
    """

    def __init__(self) -> None:
        self._audited: WindowCounter[str | None] = WindowCounter(MINUTE)

    def split(self, events: Iterable[AuditEvent], now: float) -> tuple[list[AuditEvent], list[AuditEvent]]:
        """Return (events to write in the commit, events to count). Call `written` after the commit."""
        self._audited.roll(now)
        audited, counted, new = list[AuditEvent](), list[AuditEvent](), Counter[str | None]()
        for event in events:
            if _bare_repeat(event):
                new[event.destination] += 1
                if self._audited[event.destination] + new[event.destination] > REPEATS:
                    counted.append(event)
                    continue
            audited.append(event)
        return audited, counted

    def written(self, audited: Iterable[AuditEvent]) -> None:
        """Record that the events are committed."""
        for event in audited:
            if _bare_repeat(event):
                self._audited.add(event.destination)


def _bare_repeat(event: AuditEvent) -> bool:
    return event.outcome == "duplicate" and "taken_up" not in (event.detail or {})
