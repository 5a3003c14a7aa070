"""The statements of the accept path, as texts."""

from __future__ import annotations

import pytest

from receiver.storage import statements


@pytest.mark.parametrize("statement", [statements.CLAIM_KEYS, statements.EXISTING, statements.ADD_DELIVERIES])
def test_psycopg_keeps_them(statement: str) -> None:
    """psycopg remembers how it takes a statement apart only up to this length: a longer one costs that at each run."""
    assert len(statement) <= 4096
