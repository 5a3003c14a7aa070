"""Rows of `outbound_requests` for tests."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, text


def add_requests(
    engine: Engine,
    count: int,
    *,
    state: str = "dead",
    lane: str | None = "@outbox/lab/d",
    error: str = "Rejected",
    request: bytes | None = b"sealed",
    key: str = "lab",
) -> None:
    """Insert rows. Their bodies cannot be decrypted."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbound_requests (uuid, api_key, lane, call, kind, created_by, state, error_class, "
                "attempts, unanswered, ready_at, request, request_key) "
                "SELECT gen_random_uuid(), :key, :lane, 'send', 'Notes.New', 't', :state, :error, 7, 3, "
                "now(), :request, 'payload-x' FROM generate_series(1, :count)"
            ),
            {"count": count, "state": state, "lane": lane, "error": error, "request": request, "key": key},
        )


def column(engine: Engine, name: str) -> list[Any]:
    """Return a column of all requests, in the order of ids."""
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT {name} FROM outbound_requests ORDER BY id")))
