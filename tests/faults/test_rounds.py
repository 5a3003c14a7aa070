"""The rounds in their short form: twenty mishaps, as far as the time goes, and nothing is violated.

`./tests/faults/run` is the long form.
"""

from __future__ import annotations

import random

import pytest

from tests.faults.mishaps import MISHAPS
from tests.faults.rounds import order, run

ROUNDS = 20
# On a machine that does much else; some three minutes on one that does nothing else.
SECONDS = 240.0


@pytest.mark.first
@pytest.mark.timeout(800)
def test_nothing_is_violated() -> None:
    """Whatever happened, and whenever: what must hold holds. The seed is in the failure."""
    seed = random.SystemRandom().randrange(1_000_000)
    made = run(seed, ROUNDS, seconds=SECONDS)
    assert made.wrong == [], f"./tests/faults/run --rounds {ROUNDS} --seed {seed}"
    assert len(made.rounds) >= 3
    assert made.counts["messages recorded"] > 20


def test_the_same_seed_is_the_same_order() -> None:
    """Every mishap comes once before any comes again."""
    first = list(order(7, 2 * len(MISHAPS)))
    assert first == list(order(7, 2 * len(MISHAPS)))
    assert first != list(order(8, 2 * len(MISHAPS)))
    assert set(first[: len(MISHAPS)]) == set(first[len(MISHAPS) :]) == set(MISHAPS)
