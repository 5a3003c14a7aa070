"""The assessment of series: which values grow, and which do not."""

from __future__ import annotations

import math
import random

import pytest

from tests.faults.series import Series, Word, assess

DICE = random.Random(5)
MINUTE = 60.0


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("level", [100.0] * 120),
        ("level", [100.0 + DICE.uniform(-3, 3) for _ in range(120)]),
        ("level", [40.0 + 60 * (1 - math.exp(-n / 8)) for n in range(120)]),  # caches that fill
        ("level", [100.0 + 5 * (n % 24) for n in range(120)]),  # dead rows between two vacuums
        ("level", [200.0 - n for n in range(120)]),
        ("growing", [100.0 + n for n in range(120)]),
        ("growing", [100.0 + n // 10 * 8 + DICE.uniform(-4, 4) for n in range(120)]),
        ("growing", [100.0 + (n / 10) ** 2 for n in range(120)]),
    ],
)
def test_growth_is_found(word: Word, values: list[float]) -> None:
    """A series grows if it gains more than its tolerance after the warm-up, steadily."""
    series = Series(name="memory", unit="MiB", tolerance=4.0, times=[5.0 * n for n in range(120)], values=values)
    assert assess(series, 3 * MINUTE).word == word


def test_growth_by_design() -> None:
    """A series that is designed to grow is not a violation, and its growth a day is computed."""
    series = Series(name="messages", unit="", tolerance=0.0, designed=True)
    for second in range(100):
        series.add(float(second), 2.0 * second)
    found = assess(series, 0.0)
    assert (found.word, round(found.daily), found.last) == ("by design", 2 * 86_400, 198.0)


def test_nothing_measured_is_level() -> None:
    """A series without values after the warm-up is level."""
    assert assess(Series(name="x", unit="", tolerance=0.0), 1.0).word == "level"
