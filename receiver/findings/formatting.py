"""Formatting of times, durations and counts in sentences. The command line uses it too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def at(time: datetime) -> str:
    """Return a time in UTC, to the second."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def span(length: timedelta) -> str:
    """Return a duration in the largest unit that fits: `3 h`."""
    seconds = max(0, int(length.total_seconds()))
    size, unit = next((each for each in ((86_400, "d"), (3_600, "h"), (60, "min")) if seconds >= each[0]), (1, "s"))
    return f"{seconds // size} {unit}"


def count(number: int, one: str, several: str) -> str:
    """Return a number with its noun: 1 delivery, 2,000 deliveries."""
    return f"{number:,} {one if number == 1 else several}"
