"""Corrections of requests to Redox: send again."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Engine, text

from receiver.storage.operations.corrections.request_corrections import RequestCorrections
from receiver.storage.operations.outbound_requests import RequestFilter
from tests.storage.operations.request_rows import add_requests, column

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


def test_retry_in_batches(engine: Engine, request_corrections: RequestCorrections) -> None:
    """Any number of requests is retried, each with an audit row."""
    add_requests(engine, 1_203)
    assert len(request_corrections.retry(RequestFilter(api_key="lab"), NOW, reason="why", dry_run=True).done) == 1_203
    assert set(column(engine, "state")) == {"dead"}
    done = request_corrections.retry(RequestFilter(api_key="lab"), NOW, reason="why")

    assert (len(done.done), done.left) == (1_203, {})
    assert set(zip(column(engine, "state"), column(engine, "attempts"), column(engine, "unanswered"), strict=True)) == {
        ("pending", 0, 0)
    }
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM audit_events WHERE action = 'outbound.retry'")) == 1_203


def test_by_filters_it_is_the_dead(engine: Engine, request_corrections: RequestCorrections) -> None:
    """Held and pending requests are selected only by state or id."""
    for state in ("dead", "held", "pending", "sent"):
        add_requests(engine, 1, state=state)
    assert request_corrections.retry(RequestFilter(api_key="lab"), NOW, reason="why").done == (1,)
    assert request_corrections.retry(RequestFilter(state="held"), NOW, reason="why").done == (2,)
    assert request_corrections.retry(RequestFilter(ids=(3, 4)), NOW, reason="why").done == (3,)
    assert column(engine, "attempts") == [0, 0, 7, 7]
    assert column(engine, "state") == ["pending"] * 3 + ["sent"]


def test_what_is_left_is_told(engine: Engine, request_corrections: RequestCorrections) -> None:
    """A direct call, a purged request, a sent one and one that does not exist are left unchanged, each with a
    reason.
    """
    add_requests(engine, 1, lane=None)
    add_requests(engine, 1, request=None)
    add_requests(engine, 1, state="sent")
    done = request_corrections.retry(RequestFilter(ids=(1, 2, 3, 4)), NOW, reason="why")

    assert done.done == ()
    assert [done.left[number].split()[1] for number in (1, 2, 3, 4)] == ["a", "purged:", "sent", "not"]
    assert column(engine, "state") == ["dead", "dead", "sent"]
