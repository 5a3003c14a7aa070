"""The soak finds what grows, and lets by what does not."""

from __future__ import annotations

import math
import random

import pytest

from tests.faults.series import Series, Word, judge

DICE = random.Random(5)
MINUTE = 60.0


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("level", [100.0] * 120),
        ("level", [100.0 + DICE.uniform(-3, 3) for _ in range(120)]),
        ("level", [40.0 + 60 * (1 - math.exp(-n / 8)) for n in range(120)]),  # caches that fill up
        ("level", [100.0 + 5 * (n % 24) for n in range(120)]),  # dead rows between two vacuums
        ("level", [200.0 - n for n in range(120)]),
        ("growing", [100.0 + n for n in range(120)]),
        ("growing", [100.0 + n // 10 * 8 + DICE.uniform(-4, 4) for n in range(120)]),
        ("growing", [100.0 + (n / 10) ** 2 for n in range(120)]),
    ],
)
def test_what_grows_is_found(word: Word, values: list[float]) -> None:
    """After the warm-up, by more than settling explains, and steadily."""
    series = Series(name="memory", unit="MiB", tolerance=4.0, times=[5.0 * n for n in range(120)], values=values)
    assert judge(series, 3 * MINUTE).word == word


def test_what_is_to_grow_is_let_grow() -> None:
    """And what it would be in a day is told."""
    series = Series(name="messages", unit="", tolerance=0.0, designed=True)
    for second in range(100):
        series.add(float(second), 2.0 * second)
    found = judge(series, 0.0)
    assert (found.word, round(found.daily), found.last) == ("by design", 2 * 86_400, 198.0)


def test_nothing_measured_is_level() -> None:
    """A series that ends before the warm-up does tells nothing."""
    assert judge(Series(name="x", unit="", tolerance=0.0), 1.0).word == "level"
