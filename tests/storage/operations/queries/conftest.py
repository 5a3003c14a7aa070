"""Fixtures of the tests of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine


@pytest.fixture
def ask(engine: Engine) -> Callable[..., Any]:
    """Run one query."""

    def one(question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with engine.connect() as connection:
            return question(connection, *arguments, **options)

    return one
