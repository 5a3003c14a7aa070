"""Disclosure of sealed content."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text

from receiver.errors import Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.storage.operations.disclosure import disclose_request
from tests.storage.operations.request_rows import add_requests

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


def test_request_bodies(engine: Engine, keyring: Keyring) -> None:
    """A request that does not exist, is purged or cannot be decrypted is an error, and no audit row is written."""
    add_requests(engine, 1, request=None)
    add_requests(engine, 1)
    with pytest.raises(NotFound, match="outbox list"):
        disclose_request(engine, keyring, 99, NOW, actor="tester@test", reason="why")
    with pytest.raises(Conflict, match="purged"):
        disclose_request(engine, keyring, 1, NOW, actor="tester@test", reason="why")
    with pytest.raises(IntegrityError):
        disclose_request(engine, keyring, 2, NOW, actor="tester@test", reason="why")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM audit_events")) == 0
