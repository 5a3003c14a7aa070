"""Floods: clients send as fast as they can, while one valid feed must still be served and nothing may grow without end.

`python -m tests.faults.floods` runs this part alone. One flood after another runs from several addresses against `up`
with a real database, while one valid feed sends message after message. Then comes a burst of valid messages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Final

from receiver.storage.evidence.flood_control import NAMED, ROWS_IN_ALL
from tests.faults.flood_senders import CONNECTIONS, KINDS, MADE_UP, NEW, NO_ROWS
from tests.faults.flooded_machine import (
    PROCESSES,
    RECEIVERS,
    UNREGISTERED,
    FloodedMachine,
    FloodOutcome,
    destination_of,
)
from tests.faults.report import Progress, Section
from tests.support.machine import machine
from tests.support.waiting import until

SECONDS: Final = 20.0
BURST: Final = 100_000
# Audit rows that a flood may leave at one receiver in one minute. Rows of valid messages are not counted.
_ROWS: Final = 2 * ROWS_IN_ALL + NAMED + 1


def floods(
    here: FloodedMachine, seconds: float, kinds: Sequence[str], progress: Progress
) -> tuple[list[FloodOutcome], list[str]]:
    """Run each flood. Returns the outcomes and the violations."""
    here.run(None, min(seconds, 5.0))  # to warm up
    outcomes = [here.run(None, seconds)]
    for kind in kinds:
        outcomes.append(here.run(kind, seconds))
        progress(f"{kind}: {_line(outcomes[-1])}")

    def counted() -> bool:
        for each in outcomes[1:]:
            here.count(each)
        return all(
            each.counted >= each.responses.total() - each.responses[0]
            for each in outcomes[1:]
            if each.kind not in NO_ROWS
        )

    with suppress(AssertionError):
        until(counted, seconds=120)  # counts are written within a minute
    violations = [f"{each.kind}: {violation}" for each in outcomes for violation in _violations(each)]
    if MADE_UP in kinds:
        listed = here.host.json("source", "list", destination_of(MADE_UP), "--refused", "--limit", "20")
        found = [each for each in listed if each["source_id"] == UNREGISTERED]
        if not found or found[0]["count"] < 2:
            violations.append(f"{MADE_UP}: the existing source is not among the first of `source list --refused`")
    return outcomes, violations


def _violations(outcome: FloodOutcome) -> list[str]:
    violations = []
    if outcome.refused:
        violations.append(f"{outcome.refused} messages of the valid feed were not accepted")
    if outcome.kind == "nothing":
        return violations
    unexpected = set(outcome.responses) - KINDS[outcome.kind][1] - {0}
    violations += [f"answered {status}, {outcome.responses[status]} times" for status in sorted(unexpected)]
    answered = outcome.responses.total() - outcome.responses[0]
    if outcome.kind not in NO_ROWS and outcome.counted < answered:
        violations.append(f"{answered:,} requests were answered, but {outcome.counted:,} are in the audit log")
    # A flood may begin late in one minute, and end early in another.
    if outcome.rows > RECEIVERS * _ROWS * (outcome.seconds // 60 + 2):
        violations.append(f"{outcome.rows:,} audit rows")
    return violations


def burst(here: FloodedMachine, count: int, progress: Progress) -> tuple[str, list[str]]:
    """Send `count` valid messages. Returns a table of the receivers' resources over time, and violations."""
    table = "SELECT count(*) AS n FROM messages"
    before = here.rows(table)[0]["n"]
    levels = {"before": here.level()}
    began, responses = time.monotonic(), Counter[int]()
    for quarter in range(1, 5):
        responses += sum((each.result() for each in here.begin(NEW, 3_600, limit=count // 4)), Counter[int]())
        levels[f"{quarter * count // 4:,}"] = here.level()
        progress(f"burst {levels[f'{quarter * count // 4:,}']}")
    seconds = time.monotonic() - began
    recorded = here.rows(table)[0]["n"] - before
    verified = here.host.json("audit", "verify")
    violations = []
    if responses.keys() != {200} or responses[200] != recorded:
        violations.append(f"burst: answered {dict(responses)}, and {recorded:,} recorded")
    columns = list(levels["before"])
    lines = [f"| {when} | {' | '.join(f'{level[each]:,.0f}' for each in columns)} |" for when, level in levels.items()]
    text = (
        f"{recorded:,} messages were recorded in {seconds:.0f} s, {recorded / seconds:,.0f} a second; the senders "
        f"share\nthe cores. Then `audit verify` read {verified['rows']:,} rows without a failure.\n\n"
        f"| messages | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n" + "\n".join(lines)
    )
    return text, violations


_TEXT: Final = """\
`up` with two receivers and the embedded PostgreSQL. For {seconds:g} s each, {connections} connections from as many
addresses send as fast as they can, while one valid feed sends message after message. The senders share the cores with
the receiver. Every request that was answered is in the audit log, as a row or in the count of a row.

| flood of | requests a second | audit rows | bytes of log a minute | valid feed: messages | p50, ms | p99, ms | \
not accepted |
|---|--:|--:|--:|--:|--:|--:|--:|
{rows}

`source list --refused` lists the existing source that is not registered among the first of the made-up ones.

### Burst

{burst}"""


def _line(outcome: FloodOutcome) -> str:
    """Return the cells of one flood."""
    cuts = statistics.quantiles(outcome.feed, n=100) if len(outcome.feed) > 1 else [0.0] * 99
    return " | ".join(
        (
            f"{outcome.responses.total() / outcome.seconds:,.0f}",
            f"{outcome.rows:,}",
            f"{60 * outcome.log_bytes / outcome.seconds:,.0f}",
            f"{len(outcome.feed):,}",
            f"{1000 * cuts[49]:.0f}",
            f"{1000 * cuts[98]:.0f}",
            f"{outcome.refused}",
        )
    )


def measure(
    progress: Progress, *, seconds: float = SECONDS, messages: int = BURST, kinds: Sequence[str] = tuple(KINDS)[:-1]
) -> Section:
    """Run every flood, and the burst. Returns the chapter of the report."""
    with machine() as host, ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        here = FloodedMachine(host, pool, [*kinds, *([NEW] if messages else [])])
        try:
            outcomes, violations = floods(here, seconds, kinds, progress)
            burst_text, more = burst(here, messages, progress) if messages else ("", [])
        finally:
            here.close()
    rows = "\n".join(f"| {each.kind} | {_line(each)} |" for each in outcomes)
    return Section(
        title="Floods and a burst",
        command=f"python -m tests.faults.floods --seconds {seconds:g} --burst {messages}",
        text=_TEXT.format(seconds=seconds, connections=PROCESSES * CONNECTIONS, rows=rows, burst=burst_text),
        violations=tuple(violations + more),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0 if there was no violation."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.floods",
        description="Flood a receiver, and check that a valid feed is still served and nothing grows without end.",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="N", help=f"Duration of each flood. Default: {SECONDS:g}."
    )
    parser.add_argument(
        "--burst", type=int, default=BURST, metavar="N", help=f"Messages in the burst. Default: {BURST}."
    )
    parser.add_argument("--only", action="append", choices=tuple(KINDS), metavar="KIND", help=", ".join(KINDS))
    options = parser.parse_args(arguments)
    section = measure(
        lambda line: print(line, flush=True),
        seconds=options.seconds,
        messages=options.burst,
        kinds=options.only or tuple(KINDS)[:-1],
    )
    print(f"\n{section.text}\n")
    for each in section.violations:
        print(f"VIOLATION {each}")
    return 1 if section.violations else 0


if __name__ == "__main__":
    sys.exit(main())
