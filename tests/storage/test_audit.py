"""The audit: chained rows, and floods that are counted exactly."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from receiver.keyring import Keyring
from receiver.storage.audit import ROWS_EACH, ROWS_IN_ALL, AuditChain, AuditEvent, Flood, network, note_binding, write
from receiver.storage.evidence import mac_key, row_mac
from receiver.storage.proof import verify
from receiver.storage.schema import audit_events
from receiver.storage.sealing import Seals

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def refusal(**changes: Any) -> AuditEvent:
    return replace(AuditEvent(action="message.refuse", outcome="refused", at=NOW, actor="unverified",
                              reason="token_wrong", peer="192.0.2.1", destination="clinic", detail={"status": 401}),
                   **changes)


# --- the chain

def test_rows_are_numbered_and_each_signed_over_the_one_before(keyring: Keyring) -> None:
    """From 1, over several calls; the first over nothing."""
    chain = AuditChain(keyring, Seals(keyring))
    first = chain.rows([refusal(), refusal()])
    chain.written(first)
    rows = [*first, *chain.rows([refusal()])]
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert len({row["writer"] for row in rows}) == 1
    key = mac_key(keyring.current("mac"))
    for previous, row in zip([b"", *(row["mac"] for row in rows)], rows, strict=False):
        assert row["mac"] == row_mac(key, "audit_events", row, previous=previous)


def test_rows_that_were_not_written_leave_no_gap(keyring: Keyring) -> None:
    """Their numbers are given again: the transaction was rolled back."""
    chain = AuditChain(keyring, Seals(keyring))
    assert chain.rows([refusal()])[0]["n"] == chain.rows([refusal()])[0]["n"] == 1


def test_a_restart_begins_another_chain(keyring: Keyring) -> None:
    """Another writer, from 1, over nothing."""
    chain = AuditChain(keyring, Seals(keyring))
    first = chain.rows([refusal()])
    chain.written(first)
    chain.restart()
    second = chain.rows([refusal()])
    assert second[0]["writer"] != first[0]["writer"]
    assert second[0]["n"] == 1


def test_a_note_is_sealed_to_its_place(keyring: Keyring) -> None:
    """A person's words are nowhere else in the row, nor in the event's repr."""
    seals = Seals(keyring)
    event = refusal(note="because of Ada")
    row = AuditChain(keyring, seals).rows([event])[0]
    assert "Ada" not in repr(event) + str(row)
    assert seals.open(row["note_key"], row["note"], note_binding(row["writer"], 1)) == b"because of Ada"


def test_details_are_one_text_however_they_were_put_together(keyring: Keyring) -> None:
    """Sorted: the text is under the MAC."""
    chain = AuditChain(keyring, Seals(keyring))
    one, two = (chain.rows([refusal(detail=detail)])[0]["detail"]
                for detail in ({"b": 1, "a": (2,)}, {"a": [2], "b": 1}))
    assert one == two == '{"a":[2],"b":1}'
    assert chain.rows([refusal(detail=None)])[0]["detail"] is None


def test_a_process_that_writes_now_and_then_writes_in_its_own_transaction(engine: Engine, keyring: Keyring) -> None:
    """`write`: the rows are there with the transaction, or not at all, and prove to be whole."""
    chain = AuditChain(keyring, Seals(keyring))
    with engine.begin() as connection:
        write(connection, chain, [refusal(note="why"), refusal()])
        write(connection, chain, [])
    with engine.connect() as connection:
        write(connection, chain, [refusal()])
        connection.rollback()
    chain.restart()
    with engine.begin() as connection:
        write(connection, chain, [refusal()])
        proof = verify(connection, keyring)
        assert (proof.writers, proof.first_bad) == (2, None)
        assert len(connection.execute(select(audit_events)).all()) == 3


def test_audit_rows_are_only_ever_added(engine: Engine, keyring: Keyring) -> None:
    """The database itself refuses anything else, be it in psql."""
    with engine.begin() as connection:
        write(connection, AuditChain(keyring, Seals(keyring)), [refusal()])
    for statement in ("UPDATE audit_events SET reason = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events"):
        with engine.connect() as connection, pytest.raises(Exception, match="RestrictViolation 23001"):
            connection.exec_driver_sql(statement)


# --- floods

def test_the_first_refusals_are_told_as_they_are_and_the_rest_counted() -> None:
    """A row each at first; then one row with the sum and the last one's time, without what differed."""
    flood = Flood()
    events = [refusal(at=NOW.replace(second=n), detail={"n": n}) for n in range(ROWS_EACH + 5)]
    told = [each for event in events for each in flood.take(event, 100.0, room=True)]
    assert told == events[:ROWS_EACH]
    assert flood.due(159.9) == []
    assert flood.due(160.0) == [replace(events[-1], count=5, detail=None)]
    assert flood.take(events[0], 161.0, room=True) == [events[0]]


def test_what_differs_is_counted_apart() -> None:
    """Action, destination, reason and network: the one does not hide the other."""
    flood = Flood()
    others = [refusal(), refusal(action="destination.handshake"), refusal(destination="ward"),
              refusal(reason="token_missing"), refusal(peer="192.0.2.2")]
    for event in others * (ROWS_EACH + 2):
        flood.take(event, 100.0, room=True)
    assert sorted(each.count for each in flood.end(100.0)) == [2] * len(others)


def test_ever_new_addresses_are_counted_together_in_the_end() -> None:
    """However many networks take part, a minute makes a bounded number of rows, and none is lost."""
    flood = Flood()
    told = [each for n in range(5_000)
            for each in flood.take(refusal(peer=f"10.{n // 250}.{n % 250}.1"), 100.0, room=True)]
    summed = flood.end(100.0)
    assert len(told) == ROWS_IN_ALL
    assert len(summed) == ROWS_IN_ALL + 1
    assert sum(each.count for each in [*told, *summed]) == 5_000
    assert (summed[-1].reason, summed[-1].peer, summed[-1].destination) == ("flood", "many", None)


def test_without_room_everything_is_only_counted() -> None:
    """The database is away and what waits for it fills the memory: no minute ends, and nothing is let through."""
    flood = Flood()
    assert [flood.take(refusal(), now, room=False) for now in (100.0, 200.0, 300.0)] == [[], [], []]
    assert [each.count for each in flood.take(refusal(peer="192.0.2.2"), 301.0, room=True)] == [3, 1]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30), st.booleans()), max_size=400))
def test_no_refusal_is_ever_lost_or_told_twice(steps: list[tuple[int, int, bool]]) -> None:
    """Whoever, whenever, with room or without: the counts sum up."""
    flood, now, told = Flood(), 100.0, 0
    for peer, seconds, room in steps:
        now += seconds
        told += sum(each.count for each in flood.take(refusal(peer=f"10.0.{peer // 200}.{peer % 200}"), now, room=room))
    assert told + sum(each.count for each in flood.end(now)) == len(steps)


@pytest.mark.parametrize(("peer", "named"), [
    ("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("::ffff:192.0.2.1", "192.0.2.1"),
    ("fe80::1%eth0", "fe80::/64"), ("", "unknown"), ("unix:", "unknown"), ("192.0.2.1, 10.0.0.1", "unknown")])
def test_a_flood_is_counted_by_network(peer: str, named: str) -> None:
    """An IPv4 address, the /64 that one subscriber has, or `unknown`."""
    assert network(peer) == named


def test_a_summed_row_says_which_network(keyring: Keyring) -> None:
    """It is a row like any other."""
    flood = Flood()
    for _ in range(ROWS_EACH + 1):
        flood.take(refusal(peer="2001:db8::1"), 100.0, room=True)
    row = AuditChain(keyring, Seals(keyring)).rows(flood.end(100.0))[0]
    assert (row["peer"], row["count"], row["detail"], row["reason"]) == ("2001:db8::/64", 1, None, "token_wrong")
