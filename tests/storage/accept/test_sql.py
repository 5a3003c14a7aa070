"""The statements of the accept path, as texts."""

from __future__ import annotations

import pytest

from receiver.storage.accept import sql
from receiver.storage.accept.message_builder import MessageBuilder
from receiver.storage.evidence.encryption import Sealer
from tests.storage.door import Door, body


@pytest.mark.parametrize("statement", [sql.CLAIM_KEYS, sql.EXISTING, sql.ADD_DELIVERIES])
def test_psycopg_keeps_them(statement: str) -> None:
    """psycopg remembers how it takes a statement apart only up to this length: a longer one costs that at each run."""
    assert len(statement) <= 4096


def test_a_message_has_a_value_for_each_column(door: Door) -> None:
    """A column that a row lacks would be null, and a value without a column would be lost."""
    entry = MessageBuilder(door.keyring, Sealer(door.keyring)).make(door.admit(body("1")))
    assert entry.row.keys() == sql._MESSAGE.keys()
