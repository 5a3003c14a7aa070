"""Time series of measurements, and whether each grows.

After a warm-up, each series is fitted with a line by least squares. A series grows if the line gains more than the
tolerance and the values are close to the line. Values that go up and down, as dead rows between two vacuums do, are not
close to a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

DAY: Final = 86_400.0
# Pearson's correlation of value and time. Below it, the values are not close to a line.
_MIN_CORRELATION: Final = 0.7
_RELATIVE: Final = 0.03

Word = Literal["level", "by design", "growing"]


@dataclass(kw_only=True, slots=True)
class Series:
    """One quantity over time. It may gain `tolerance`, in its `unit`, or anything if it is `designed` to grow."""

    name: str
    unit: str
    tolerance: float
    designed: bool = False
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, time: float, value: float) -> None:
        """Add a measurement at `time` (seconds)."""
        self.times.append(time)
        self.values.append(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The assessment of a series after the warm-up. `gained` and `daily` are taken from the line."""

    series: Series
    word: Word
    first: float
    last: float
    highest: float
    gained: float
    daily: float


def line(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return (slope, correlation) by least squares; (0, 0) if there is no line."""
    n = len(times)
    if n < 2:
        return 0.0, 0.0
    mean_t, mean_v = sum(times) / n, sum(values) / n
    tt = sum((t - mean_t) ** 2 for t in times)
    vv = sum((v - mean_v) ** 2 for v in values)
    tv = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True))
    return (tv / tt, tv / (tt * vv) ** 0.5) if tt and vv else (0.0, 0.0)


def assess(series: Series, since: float) -> Verdict:
    """Assess a series after `since`, the end of the warm-up."""
    kept = [(t, v) for t, v in zip(series.times, series.values, strict=True) if t >= since] or [(0.0, 0.0)]
    times, values = [t for t, _ in kept], [v for _, v in kept]
    slope, correlation = line(times, values)
    gained = slope * (times[-1] - times[0])
    tolerated = max(series.tolerance, _RELATIVE * sum(values) / len(values))
    word: Word = "level"
    if series.designed:
        word = "by design"
    elif gained > tolerated and correlation >= _MIN_CORRELATION:
        word = "growing"
    return Verdict(
        series=series,
        word=word,
        first=values[0],
        last=values[-1],
        highest=max(values),
        gained=gained,
        daily=slope * DAY,
    )
