"""What was measured again and again, and whether it grows.

A line is laid through each series by least squares, after a warm-up. It grows when what the line gains is more than
chance and settling explain: more than its tolerance, and with the values close to the line. What goes up and down
(dead rows between two vacuums) has no line through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

DAY: Final = 86_400.0
# Pearson's correlation of value and time: below it the line tells nothing.
_STRAIGHT: Final = 0.7
_RELATIVE: Final = 0.03

Word = Literal["level", "by design", "growing"]


@dataclass(kw_only=True, slots=True)
class Series:
    """One thing over time. It may gain `tolerance`, in its `unit`; what is `designed` to grow may gain anything."""

    name: str
    unit: str
    tolerance: float
    designed: bool = False
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, time: float, value: float) -> None:
        """One measurement; `time` in seconds."""
        self.times.append(time)
        self.values.append(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a series: `first`, `last` and `highest` of what was judged; by the line, `gained` and `daily`."""

    series: Series
    word: Word
    first: float
    last: float
    highest: float
    gained: float
    daily: float


def line(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(slope, correlation) by least squares; both are 0 where there is no line."""
    n = len(times)
    if n < 2:
        return 0.0, 0.0
    mean_t, mean_v = sum(times) / n, sum(values) / n
    tt = sum((t - mean_t) ** 2 for t in times)
    vv = sum((v - mean_v) ** 2 for v in values)
    tv = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True))
    return (tv / tt, tv / (tt * vv) ** 0.5) if tt and vv else (0.0, 0.0)


def judge(series: Series, since: float) -> Verdict:
    """How it went after `since`, when everything was warm."""
    kept = [(t, v) for t, v in zip(series.times, series.values, strict=True) if t >= since] or [(0.0, 0.0)]
    times, values = [t for t, _ in kept], [v for _, v in kept]
    slope, correlation = line(times, values)
    gained = slope * (times[-1] - times[0])
    tolerated = max(series.tolerance, _RELATIVE * sum(values) / len(values))
    word: Word = "level"
    if series.designed:
        word = "by design"
    elif gained > tolerated and correlation >= _STRAIGHT:
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
