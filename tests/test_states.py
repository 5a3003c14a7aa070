"""The enums of states are the states of the tables and of the command line."""

from __future__ import annotations

import re
from enum import StrEnum

import pytest
from sqlalchemy import Engine, text

from receiver.cli.commands import deliveries, messages, outbox
from receiver.states import DeliveryState, LaneState, MessageState, OutboxState
from receiver.storage import schema


@pytest.mark.parametrize(
    ("table", "states"),
    [
        ("messages", MessageState),
        ("deliveries", DeliveryState),
        ("lanes", LaneState),
        ("outbound_requests", OutboxState),
    ],
)
def test_the_database_has_the_same_states(engine: Engine, table: str, states: type[StrEnum]) -> None:
    """The constraint of a migrated table, and that of the schema, list the values of the enum."""
    name = f"ck_{table}_state"
    with engine.connect() as connection:
        found = connection.scalar(
            text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = :name"), {"name": name}
        )
    declared = next(each for each in schema.metadata.tables[table].constraints if each.name == name)
    for definition in (str(found), str(declared.sqltext)):  # type: ignore[attr-defined]
        assert set(re.findall(r"'(\w+)'", definition)) == set(states)


def test_the_command_line_offers_the_same_states() -> None:
    """`--state` takes the values of the enums."""
    assert set(messages.STATES) == set(MessageState)
    assert set(deliveries.STATES) == set(DeliveryState)
    assert set(outbox.STATES) == set(OutboxState)
