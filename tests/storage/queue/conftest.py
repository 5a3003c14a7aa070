"""Fixtures of the tests of the queue."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine

from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import HandlerSpec
from tests.storage.queue.rows import Rows


@pytest.fixture
def rows(engine: Engine, registration: RegistryChanges) -> Iterator[Rows]:
    """Deliveries of the handler `h` at the destination `lab`."""
    registration.add_destination(
        "lab",
        datetime.now(UTC),
        environment="staging",
        require=["token"],
        sources_policy="any",
        reply_with=None,
        on_unknown_source="reject",
        test_messages="accept",
        token="a token of twenty-four characters",
    )
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="h",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=3,
            timeout=1,
        ),
        datetime.now(UTC),
    )
    with engine.connect() as one, engine.connect() as two:
        yield Rows(
            one.execution_options(isolation_level="AUTOCOMMIT"), two.execution_options(isolation_level="AUTOCOMMIT")
        )
