"""Samples of every kind. They take seconds to make, so all tests share them."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.samples.sample import kinds, sample
from tests.simulator import SOURCE


@pytest.fixture(scope="session")
def bodies() -> dict[str, dict[str, Any]]:
    """A sample of each kind, with seed 5."""
    return {kind: sample(kind, seed=5, source_id=SOURCE) for kind in kinds()}
