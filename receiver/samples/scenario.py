"""A scenario: a fictional patient, a relative, the staff, a time, and consistent numbers.

Must not be random: everything follows from the seed, so a body can be made again.
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

# The content of a template: JSON in which a value may be a function of the scenario.
Node = dict[str, "Node"] | list["Node"] | Callable[["Scenario"], Any] | str | int | float | bool | None

# A Monday morning. Each seed has its own minute after it.
_FIRST_MINUTE: Final = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
_MINUTES: Final = 60 * 24 * 180


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The data that fills a sample. `at`: the event's time, in aware UTC."""

    seed: int
    kind: str
    patient: Person
    relative: Person
    staff: tuple[Person, ...]
    at: datetime

    def number(self, what: str, digits: int = 8) -> int:
        """Return a number with `digits` digits, always the same for one seed and one `what` (a visit, an order)."""
        digest = int.from_bytes(sha256(f"{self.seed}:{what}".encode()).digest()[:8])
        least: int = 10 ** (digits - 1)
        return least + digest % (9 * least)

    def uuid(self, what: str) -> str:
        """Return a UUID for this message. Another kind with the same seed has another one."""
        digest = sha256(f"{self.seed}:{self.kind}:{what}".encode()).digest()
        return str(UUID(bytes=digest[:16], version=4))

    def time(self, hours: float = 0) -> str:
        """Return a time in ISO 8601 in UTC with milliseconds, as Redox writes it. `hours`: after the event; negative
        for before.
        """
        return (self.at + timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def day(self, days: float = 0) -> str:
        """Return an ISO 8601 date. `days`: after the event's date."""
        return (self.at + timedelta(days=days)).date().isoformat()


def make_scenario(kind: str, *, seed: int, patient: Person | None = None, at: datetime | None = None) -> Scenario:
    """Return the scenario for `seed`, always the same. The relative has the family name of the `patient`, if one is
    passed.
    """
    patient = patient or person(seed)
    return Scenario(
        seed=seed,
        kind=kind,
        patient=patient,
        relative=person(seed + 1_000_003, family=patient.family),
        staff=_staff(seed % 7),
        at=at or _FIRST_MINUTE + timedelta(minutes=seed % _MINUTES),
    )


def render(node: Node, scenario: Scenario) -> Any:
    """Return the JSON value of a template for one scenario. Every container is a new object."""
    if isinstance(node, dict):
        return {name: render(value, scenario) for name, value in node.items()}
    if isinstance(node, list):
        return [render(value, scenario) for value in node]
    return node(scenario) if callable(node) else node


@lru_cache(maxsize=7)
def _staff(team: int) -> tuple[Person, ...]:
    """Return one of seven teams of four: a hospital has few doctors and many patients."""
    return tuple(person(-1 - 4 * team - member) for member in range(4))
