"""Which notices are due: a pure decision from what is found now and what was said before.

Must not do I/O, nor read a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

# Consecutive looks that must find a condition before it is said, and miss it before it is called over: what comes and
# goes within a minute needs nobody.
LOOKS: Final = 2
# Notices in any hour, over all conditions.
MOST_AN_HOUR: Final = 20
_HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A finding, as people are told: `code` and `destination` identify it; `text` and `fix` may change."""

    code: str
    destination: str | None
    text: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """What to say about a condition. `left_out`: how many other notices the hourly limit kept back before this one."""

    event: Literal["opened", "reminder", "resolved"]
    condition: Condition
    left_out: int = 0


@dataclass(slots=True)
class _KnownCondition:
    condition: Condition
    found: int = 0  # consecutive looks
    missed: int = 0
    said_at: float | None = None


class NoticePlan:
    """Remembers what was found and said. `repeat`: seconds after which a condition that lasts is said again."""

    def __init__(self, *, repeat: float) -> None:
        self._repeat = repeat
        self._known: dict[tuple[str, str | None], _KnownCondition] = {}
        self._times: list[float] = []
        self._left_out = 0

    def due(self, conditions: Iterable[Condition], now: float) -> list[Notice]:
        """Return the notices that are due `now` (seconds, of any clock that only goes forward)."""
        current = {(each.code, each.destination): each for each in conditions}
        notices = []
        for key, condition in current.items():
            known = self._known.setdefault(key, _KnownCondition(condition))
            known.condition, known.found, known.missed = condition, known.found + 1, 0
            if known.said_at is None and known.found >= LOOKS:
                notices += self._say("opened", known, now)
            elif known.said_at is not None and now - known.said_at >= self._repeat:
                notices += self._say("reminder", known, now)
        for key in self._known.keys() - current.keys():
            known = self._known[key]
            known.found, known.missed = 0, known.missed + 1
            if known.said_at is None:
                del self._known[key]
            elif known.missed >= LOOKS:
                # Never left out: somebody may be working on it.
                notices.append(Notice(event="resolved", condition=known.condition))
                del self._known[key]
        return notices

    def forget(self) -> None:
        """Forget what was found and said: another host takes over."""
        self._known.clear()

    def _say(self, event: Literal["opened", "reminder"], known: _KnownCondition, now: float) -> list[Notice]:
        self._times = [each for each in self._times if now - each < _HOUR]
        if len(self._times) >= MOST_AN_HOUR:
            self._left_out += known.said_at is None and known.found == LOOKS
            return []
        self._times.append(now)
        left_out, self._left_out = self._left_out, 0
        known.said_at = now
        return [Notice(event=event, condition=known.condition, left_out=left_out)]
