"""One pass over every kind: making all the templates costs seconds, so all tests share it."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.samples.sample import kinds, sample
from tests.simulator import SOURCE


@pytest.fixture(scope="session")
def bodies() -> dict[str, dict[str, Any]]:
    """A sample of every kind, all of seed 5."""
    return {kind: sample(kind, seed=5, source_id=SOURCE) for kind in kinds()}
