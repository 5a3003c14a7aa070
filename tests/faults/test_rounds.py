"""The rounds in their short form: every mishap once, as far as the time goes, and nothing is violated.

`./tests/faults/run` is the long form.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.faults.mishaps import MISHAPS
from tests.faults.rounds import Round, Run, order, report, run

# What the short form may take, once everything runs.
SECONDS = 90.0


@pytest.mark.timeout(420)
def test_nothing_is_violated() -> None:
    """Whatever happened, and whenever: what must hold holds. The seed is in the failure."""
    seed = random.SystemRandom().randrange(1_000_000)
    made = run(seed, len(MISHAPS), ends=time.monotonic() + SECONDS)
    assert made.wrong == [], f"./tests/faults/run --rounds {len(made.rounds)} --seed {seed}"
    assert len(made.rounds) >= 3
    assert made.counts["messages recorded"] > 20


def test_the_same_seed_is_the_same_order() -> None:
    """Every mishap comes once before any comes again."""
    first = list(order(7, 2 * len(MISHAPS)))
    assert first == list(order(7, 2 * len(MISHAPS)))
    assert first != list(order(8, 2 * len(MISHAPS)))
    assert set(first[:len(MISHAPS)]) == set(first[len(MISHAPS):]) == set(MISHAPS)


def test_the_report_tells_what_was_violated() -> None:
    """And the command that repeats it."""
    made = Run(seed=7, rounds=[Round(mishap="worker_killed", lasted=1.0, accepting=0.5)], delivering=[3.0],
               wrong=["messages 1: lost"], counts={"messages recorded": 1})
    told = report(made, "./tests/faults/run --rounds 1 --seed 7")
    assert "    ./tests/faults/run --rounds 1 --seed 7\n" in told
    assert "**1 violations**" in told
    assert "\n- messages 1: lost\n" in told
    assert "| SIGKILL of a worker, on either host | 1 | 1.0 | 0.50 | 0.50 |" in told
