"""What was found, for people: goals with what was reached, tables, and the Markdown of deploy/PERFORMANCE.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.measure import MB, Results, Sample, ratio
from tests.bench.targets import OURS, SAYS, PgBench

_MODES: Final = {"flask-mode": "Flask mode", "asgi-mode": "asgi mode"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What was to be reached, and what was: `reached` is None where it was not measured. `least`: more is better."""

    says: str
    bound: float
    reached: float | None
    least: bool = True
    unit: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.reached is None:
            return "not measured"
        return "met" if (self.reached >= self.bound if self.least else self.reached <= self.bound) else "missed"

    @property
    def line(self) -> str:
        """In a sentence."""
        reached = "–" if self.reached is None else f"{self.reached:.2f}{self.unit}"
        return f"{self.says}: {reached} (goal {'≥' if self.least else '≤'} {self.bound:g}{self.unit}, {self.verdict})"


def goals(results: Results) -> list[Goal]:
    """All of them."""

    def rates(over: str, under: str, connections: int, other: int | None = None) -> float | None:
        return ratio(
            results.of("closed", over, "4 KB", connections), results.of("closed", under, "4 KB", other or connections)
        )

    found = []
    for connections in (16, 64):
        at = f"4 KB, {connections} connections"
        found += [
            Goal(
                says=f"Flask mode to {SAYS[other]}, {at}", bound=bound, reached=rates("flask-mode", other, connections)
            )
            for other, bound in (("flask", 0.65), ("orm", 2.8), ("orm-work", 5.0), ("express", 1.0))
        ]
    at = "4 KB, 64 connections"
    found += [
        Goal(says=f"asgi mode to {SAYS[other]}, {at}", bound=bound, reached=rates("asgi-mode", other, 64))
        for other, bound in (("fastify", 1.0), ("fastify-work", 2.0))
    ]
    found += [
        Goal(
            says=f"asgi mode to {SAYS['pgbench']}, {at}",
            bound=0.5,
            reached=rates("asgi-mode", "pgbench", 64, PgBench.CLIENTS),
        ),
        Goal(
            says=f"CPU of asgi mode and PostgreSQL to that of {SAYS['flask']}, {at}",
            bound=1.0,
            least=False,
            reached=_paired(
                results.of("closed", "asgi-mode", "4 KB", 64),
                results.of("closed", "flask", "4 KB", 64),
                lambda ours, other: ours.cpu / other.cpu,
            ),
        ),
    ]
    return [*found, *_latencies(results), *_memory(results)]


def _paired(one: Sequence[Sample], other: Sequence[Sample], of: Callable[[Sample, Sample], float]) -> float | None:
    """The median, round by round; None where either was not measured."""
    values = [of(a, b) for a, b in zip(one, other, strict=False)]
    return statistics.median(values) if values else None


def _latencies(results: Results) -> list[Goal]:
    found = []
    for mode, name in _MODES.items():
        found += [
            Goal(
                says=f"p50 at one connection, {name} to {SAYS[other]}",
                bound=bound,
                least=False,
                reached=_paired(
                    results.of("closed", mode, "4 KB", 1),
                    results.of("closed", other, "4 KB", 1),
                    lambda ours, theirs: ours.p50 / theirs.p50,
                ),
            )
            for other, bound in (("fastify-work", 1.0), ("flask", 3.0))
        ]
    for mode, name in _MODES.items():
        steady = results.of("open", mode, "4 KB", 300)
        refused = [results.of("refused", each, "4 KB", 16) for each in (mode, "flask")]
        found += [
            Goal(
                says=f"300 a second, p99 over p50, {name}",
                bound=5.0,
                least=False,
                unit=" ms",
                reached=_paired(steady, steady, lambda one, _: (one.p99 - one.p50) * 1000),
            ),
            Goal(says=f"wrong token, {name} to {SAYS['flask']}", bound=0.85, reached=ratio(*refused)),
        ]
    return found


def _memory(results: Results) -> list[Goal]:
    pss, largest = results.memory.get("pss", []), results.memory.get("largest", [])
    after = pss[1]["messages"] if len(pss) > 1 else 100_000
    return [
        Goal(
            says=f"memory of a receiver process after {after:,} messages",
            bound=70.0,
            least=False,
            unit=" MB",
            reached=pss[1]["bytes"] / MB if len(pss) > 1 else None,
        ),
        *(
            Goal(
                says=f"what a process grows by at its peak to its bodies, {each['at_once']} of {each['name']} at once",
                bound=4.0,
                least=False,
                reached=(each["peak"] - each["before"]) / (each["at_once"] * each["body"]),
            )
            for each in largest
        ),
    ]


def tables(results: Results) -> str:
    """Everything, as plain text."""
    lines: list[str] = []
    for part, size, load in _cases(results):
        lines += [
            "",
            f"{part}, {size}, {load} {'requests a second' if part == 'open' else 'connections'}",
            f"  {'':<46}{'answers/s':>10} {'(spread)':>13}{'p50 ms':>9}{'p99 ms':>9}{'CPU µs':>8}{'+ PG µs':>9}",
        ]
        lines += [_row(name, of) for name in SAYS if (of := results.of(part, name, size, load))]
    if pss := results.memory.get("pss"):
        lines += [
            "",
            "memory of the larger receiver process (PSS): "
            + ", ".join(f"{each['bytes'] / MB:.0f} MB after {each['messages']:,} messages" for each in pss),
        ]
    lines += [
        f"bodies of {each['name']}, {each['at_once']} at once: peak {each['peak'] / MB:.0f} MB, "
        f"{each['before'] / MB:.0f} before, told {each['refused']} times to come again"
        for each in results.memory.get("largest", [])
    ]
    if kept := results.kept:
        lines += [
            "",
            (
                f"{kept['answered']:,} messages answered 200 and {kept['cut']:,} cut off at the end of a load; "
                f"{kept['kept']:,} kept, {kept['repeats']} taken for repeats; audit of {kept['rows']:,} rows "
                f"{'holds' if kept['proved'] else 'DOES NOT HOLD'}"
            ),
        ]
    return "\n".join([*lines, "", *(goal.line for goal in goals(results)), *_faults(results)])


def _faults(results: Results) -> list[str]:
    return [
        *(f"!! NOT MEASURED: {each}" for each in results.missing),
        *(f"!! INVALID: {each}" for each in results.faults),
    ]


def markdown(results: Results, machine: Mapping[str, str]) -> str:
    """The tables of deploy/PERFORMANCE.md."""

    def rate(name: str, connections: int) -> str:
        of = results.of("closed", name, "4 KB", connections)
        return f"{_median(of, 'rate'):,.0f}" if of else "–"

    def cost(name: str) -> str:
        of = results.of("closed", name, "4 KB", 64) or results.of("closed", name, "4 KB", 16)
        if not of:
            return "–"
        return f"{_median(of, 'server_cpu') * 1e6:,.0f} + {_median(of, 'database_cpu') * 1e6:,.0f}"

    def p50(name: str) -> str:
        of = results.of("closed", name, "4 KB", 1)
        return f"{_median(of, 'p50') * 1e3:.2f}" if of else "–"

    measured = {each.target for each in results.samples if each.part == "closed"}
    lines = [
        "| 4 KB, answers a second | 1 connection | 16 | 64 | p50 at 1, ms | CPU of one + PostgreSQL's, µs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {'**' if name in OURS else ''}{says}{'**' if name in OURS else ''} | "
        f"{' | '.join(rate(name, each) for each in (1, 16, 64))} | {p50(name)} | {cost(name)} |"
        for name, says in SAYS.items()
        if name in measured
    ]
    lines += ["", "| goal | reached | |", "|---|--:|---|"]
    lines += [
        f"| {goal.says} {'≥' if goal.least else '≤'} {goal.bound:g}{goal.unit} | "
        f"{goal.reached:.2f}{goal.unit} | {goal.verdict} |"
        for goal in goals(results)
        if goal.reached is not None
    ]
    lines += [
        "",
        f"{_longest(results)} rounds in turn, medians. "
        + ", ".join(value if name == "machine" else f"{name} {value}" for name, value in machine.items())
        + ".",
    ]
    return "\n".join([*lines, *_faults(results)])


def _longest(results: Results) -> int:
    return max((each.round for each in results.samples), default=0)


def _cases(results: Results) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys((each.part, each.body, each.load) for each in results.samples))


def _median(of: Sequence[Sample], name: str) -> float:
    values = [getattr(each, name) for each in of]
    return math.nan if any(math.isnan(value) for value in values) else statistics.median(values)


def _row(name: str, of: Sequence[Sample]) -> str:
    rates = [each.rate for each in of]
    spread = f"({min(rates):.0f}–{max(rates):.0f})"
    return (
        f"  {SAYS[name]:<46}{_median(of, 'rate'):>10.0f} {spread:>13}{_median(of, 'p50') * 1e3:>9.2f}"
        f"{_median(of, 'p99') * 1e3:>9.2f}{_median(of, 'server_cpu') * 1e6:>8.0f}"
        f"{_median(of, 'database_cpu') * 1e6:>9.0f}"
    )
