"""One made-up case: a patient, a relative, the staff, a time, and numbers that agree with each other.

May not hold randomness: all of it follows from the seed, so a body can be made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from receiver.samples.people import Person, person

# What a template is made of: JSON in which a value may be a function of the case.
Node = dict[str, "Node"] | list["Node"] | Callable[["Scenario"], Any] | str | int | float | bool | None

# A Monday morning; each seed has its own minute after it.
_FIRST_MINUTE: Final = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
_MINUTES: Final = 60 * 24 * 180


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What a sample is filled from. `at` is the event's time, aware UTC."""

    seed: int
    kind: str
    patient: Person
    relative: Person
    staff: tuple[Person, ...]
    at: datetime

    def number(self, what: str, digits: int = 8) -> int:
        """A number of that many digits, the same wherever one seed asks for the same thing (a visit, an order)."""
        digest = int.from_bytes(sha256(f"{self.seed}:{what}".encode()).digest()[:8])
        least: int = 10 ** (digits - 1)
        return least + digest % (9 * least)

    def uuid(self, what: str) -> str:
        """A UUID of this very message: another kind with the same seed has another."""
        digest = sha256(f"{self.seed}:{self.kind}:{what}".encode()).digest()
        return str(UUID(bytes=digest[:16], version=4))

    def time(self, hours: float = 0) -> str:
        """ISO 8601 in UTC with milliseconds, as Redox writes it; `hours` after the event (before, when negative)."""
        return (self.at + timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def day(self, days: float = 0) -> str:
        """ISO 8601 date, `days` after the event's."""
        return (self.at + timedelta(days=days)).date().isoformat()


def case(kind: str, *, seed: int, patient: Person | None = None, at: datetime | None = None) -> Scenario:
    """The case that `seed` always gives. A `patient` passed in lends the relative the family name, as families do."""
    patient = patient or person(seed)
    return Scenario(
        seed=seed,
        kind=kind,
        patient=patient,
        relative=person(seed + 1_000_003, family=patient.family),
        staff=_staff(seed % 7),
        at=at or _FIRST_MINUTE + timedelta(minutes=seed % _MINUTES),
    )


def render(node: Node, of: Scenario) -> Any:
    """The JSON value of a template for one case. Every container is new."""
    if isinstance(node, dict):
        return {name: render(value, of) for name, value in node.items()}
    if isinstance(node, list):
        return [render(value, of) for value in node]
    return node(of) if callable(node) else node


@lru_cache(maxsize=7)
def _staff(team: int) -> tuple[Person, ...]:
    """A hospital has few doctors and many patients: seven teams of four."""
    return tuple(person(-1 - 4 * team - member) for member in range(4))
