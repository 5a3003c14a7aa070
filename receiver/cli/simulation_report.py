"""The report of `simulate`: how the receiver answered, and what was wrong."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from receiver.cli import output
from receiver.findings.formatting import count
from receiver.simulator.simulation import OUTCOMES, SimulatedResult

# The number of wrong results that are listed; the rest is counted.
_MAX_LISTED: Final = 20


def report(
    results: Sequence[SimulatedResult],
    refused: Mapping[str, int],
    seed: int,
    sent: Mapping[str, int] | None,
    *,
    as_json: bool,
) -> None:
    """Print the report. `refused`: see Simulation.refused. `sent`: what handlers sent, by kind; None without --api."""
    summary = [_summed(outcome, seconds) for outcome, seconds in _by_outcome(results).items()]
    wrong = [result for result in results if result.wrong is not None]
    if as_json:
        output.document(
            {
                "seed": seed,
                "summary": summary,
                "wrong": [asdict(result) for result in wrong],
                "retried": sum(result.attempts > 1 for result in results),
                "retries": dict(refused),
                **({} if sent is None else {"came": sent}),
            }
        )
        return
    output.rows(summary, ["outcome", "count", "median_ms", "p95_ms", "max_ms"], as_json=False, nothing="nothing sent")
    for result in wrong[:_MAX_LISTED]:
        click.echo(f"{output.escaped(result.what)}: {output.escaped(result.wrong or '')}")
    if len(wrong) > _MAX_LISTED:
        click.echo(f"and {len(wrong) - _MAX_LISTED} more")
    if refused:
        text = ", ".join(f"{reason} {number:,}" for reason, number in refused.items())
        click.echo(f"{count(sum(refused.values()), 'attempt was', 'attempts were')} refused and retried ({text})")
    if sent is not None:
        text = ", ".join(f"{output.escaped(kind)} {number}" for kind, number in sent.items())
        click.echo(f"handlers sent to Redox: {text or 'nothing'}")
    click.echo(
        f"seed {seed}; " + (count(len(wrong), "wrong answer", "wrong answers") if wrong else "all answers are correct")
    )


def _by_outcome(results: Sequence[SimulatedResult]) -> dict[str, list[float]]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        found[result.outcome].append(result.seconds)
    return {outcome: found[outcome] for outcome in OUTCOMES if outcome in found}


def _summed(outcome: str, seconds: Sequence[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 19
    return {
        "outcome": outcome,
        "count": len(seconds),
        "median_ms": round(cuts[9] * 1000, 1),
        "p95_ms": round(cuts[18] * 1000, 1),
        "max_ms": round(max(seconds) * 1000, 1),
    }
