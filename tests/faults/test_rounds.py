"""A short run of the rounds: up to twenty faults, without a violation. `./tests/faults/run` is the long run."""

from __future__ import annotations

import random

import pytest

from tests.faults.faults import FAULTS
from tests.faults.rounds import order, run

ROUNDS = 20
# Enough for three rounds on a loaded machine, and for all on an idle one.
SECONDS = 240.0


@pytest.mark.first
@pytest.mark.timeout(800)
def test_no_violations() -> None:
    """All invariants hold after random faults. A failure shows the command with the seed."""
    seed = random.SystemRandom().randrange(1_000_000)
    made = run(seed, ROUNDS, seconds=SECONDS)
    assert made.violations == [], f"./tests/faults/run --rounds {ROUNDS} --seed {seed}"
    assert len(made.rounds) >= 3
    assert made.counts["messages recorded"] > 20


def test_the_same_seed_is_the_same_order() -> None:
    """Each fault comes once before any comes again."""
    first = list(order(7, 2 * len(FAULTS)))
    assert first == list(order(7, 2 * len(FAULTS)))
    assert first != list(order(8, 2 * len(FAULTS)))
    assert set(first[: len(FAULTS)]) == set(first[len(FAULTS) :]) == set(FAULTS)
