"""The audit: chained rows, and floods that are counted exactly."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import Engine, select

from receiver.keyring import Keyring
from receiver.storage.evidence import flood_control
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, note_binding, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.flood_control import (
    NAMED,
    REPEATS,
    ROWS_EACH,
    ROWS_IN_ALL,
    FloodControl,
    Repeats,
    network,
)
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.evidence.verify import verify
from receiver.storage.schema import audit_events

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def refusal(**changes: Any) -> AuditEvent:
    return replace(
        AuditEvent(
            action="message.refuse",
            outcome="refused",
            at=NOW,
            actor="unverified",
            reason="token_wrong",
            peer="192.0.2.1",
            destination="clinic",
            detail={"status": 401},
        ),
        **changes,
    )


# --- the chain


def test_rows_are_numbered_and_each_signed_over_the_one_before(keyring: Keyring) -> None:
    """From 1, over several calls; the first over nothing."""
    chain = AuditChain(keyring, Sealer(keyring))
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
    chain = AuditChain(keyring, Sealer(keyring))
    assert chain.rows([refusal()])[0]["n"] == chain.rows([refusal()])[0]["n"] == 1


def test_a_restart_begins_another_chain(keyring: Keyring) -> None:
    """Another writer, from 1, over nothing."""
    chain = AuditChain(keyring, Sealer(keyring))
    first = chain.rows([refusal()])
    chain.written(first)
    chain.restart()
    second = chain.rows([refusal()])
    assert second[0]["writer"] != first[0]["writer"]
    assert second[0]["n"] == 1


def test_a_note_is_sealed_to_its_place(keyring: Keyring) -> None:
    """A person's words are nowhere else in the row, nor in the event's repr."""
    seals = Sealer(keyring)
    event = refusal(note="because of Ada")
    row = AuditChain(keyring, seals).rows([event])[0]
    assert "Ada" not in repr(event) + str(row)
    assert seals.open(row["note_key"], row["note"], note_binding(row["writer"], 1)) == b"because of Ada"


def test_details_are_one_text_however_they_were_put_together(keyring: Keyring) -> None:
    """Sorted: the text is under the MAC."""
    chain = AuditChain(keyring, Sealer(keyring))
    one, two = (
        chain.rows([refusal(detail=detail)])[0]["detail"] for detail in ({"b": 1, "a": (2,)}, {"a": [2], "b": 1})
    )
    assert one == two == '{"a":[2],"b":1}'
    assert chain.rows([refusal(detail=None)])[0]["detail"] is None


def test_a_process_that_writes_now_and_then_writes_in_its_own_transaction(engine: Engine, keyring: Keyring) -> None:
    """`write`: the rows are there with the transaction, or not at all, and prove to be whole."""
    chain = AuditChain(keyring, Sealer(keyring))
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
        write(connection, AuditChain(keyring, Sealer(keyring)), [refusal()])
    for statement in ("UPDATE audit_events SET reason = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events"):
        with engine.connect() as connection, pytest.raises(Exception, match="RestrictViolation 23001"):
            connection.exec_driver_sql(statement)


# --- floods


def test_the_first_refusals_are_told_as_they_are_and_the_rest_counted() -> None:
    """A row each at first; then one row with the sum and the last one's time, without what differed."""
    flood = FloodControl()
    events = [refusal(at=NOW.replace(second=n), detail={"n": n}) for n in range(ROWS_EACH + 5)]
    audited = [each for event in events for each in flood.take(event, 100.0, room=True)]
    assert audited == events[:ROWS_EACH]
    assert flood.due(159.9) == []
    assert flood.due(160.0) == [replace(events[-1], count=5, detail=None)]
    assert flood.take(events[0], 161.0, room=True) == [events[0]]


def test_what_differs_is_counted_apart() -> None:
    """Action, destination, reason and network: the one does not hide the other."""
    flood = FloodControl()
    others = [
        refusal(),
        refusal(action="destination.handshake"),
        refusal(destination="ward"),
        refusal(reason="token_missing"),
        refusal(peer="192.0.2.2"),
    ]
    for event in others * (ROWS_EACH + 2):
        flood.take(event, 100.0, room=True)
    assert sorted(each.count for each in flood.end(100.0)) == [2] * len(others)


def test_ever_new_addresses_are_counted_together_in_the_end() -> None:
    """However many networks take part, a minute makes a bounded number of rows, and none is lost."""
    flood = FloodControl()
    audited = [
        each for n in range(5_000) for each in flood.take(refusal(peer=f"10.{n // 250}.{n % 250}.1"), 100.0, room=True)
    ]
    summed = flood.end(100.0)
    assert len(audited) == ROWS_IN_ALL
    assert len(summed) == ROWS_IN_ALL + 1
    assert sum(each.count for each in [*audited, *summed]) == 5_000
    assert (summed[-1].reason, summed[-1].peer, summed[-1].destination) == ("token_wrong", "many", "clinic")


def test_strangers_do_not_hide_who_holds_a_credential() -> None:
    """Whatever strangers have used up of a minute, Redox's refusal is told as it is; and the other way round."""
    redox = refusal(actor="redox", reason="source_unknown", peer="192.0.2.9")
    for many, one in ((refusal(), redox), (refusal(), refusal(reason="token_expired")), (redox, refusal())):
        flood = FloodControl()
        for n in range(5_000):
            flood.take(replace(many, peer=f"10.{n // 250}.{n % 250}.1"), 100.0, room=True)
        assert flood.take(one, 100.0, room=True) == [one]


def named(source: str, **changes: Any) -> AuditEvent:
    """A source that is not registered."""
    return refusal(
        actor="redox",
        reason="source_unknown",
        detail={"status": 403, "source": source, "source_digest": None},
        **changes,
    )


def test_a_source_that_comes_again_is_found_among_made_up_ones() -> None:
    """Made-up names come once, and are a number in the end; one that comes back is told by its name, and how often."""
    flood = FloodControl()
    events = [named("there" if n % 500 == 250 else f"made-up-{n}") for n in range(5_000)]
    audited = [each for event in events for each in flood.take(event, 100.0, room=True)]
    several, there = flood.end(100.0)
    assert audited == events[:ROWS_EACH]
    assert (several.count, several.detail) == (5_000 - ROWS_EACH - 9, {"several": True})
    assert (there.count, there.detail) == (9, {"source": "there", "source_digest": None})
    assert {several.reason, there.reason} == {"source_unknown"}


def test_names_that_all_come_again_are_bounded() -> None:
    """So many sources a minute are told by name, and no more of their rows; the rest is one number."""
    flood = FloodControl()
    for n in range(3 * 2_000):
        flood.take(named(f"source-{n % 2_000}"), 100.0, room=True)
    summed = flood.end(100.0)
    assert len([each for each in summed if each.detail != {"several": True}]) == NAMED
    assert len(summed) == NAMED + 1
    assert sum(each.count for each in summed) == 3 * 2_000 - ROWS_EACH


def test_names_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has been silent for longest is forgotten; memory is bounded whatever strangers make up."""
    monkeypatch.setattr(flood_control, "_NAMES", 100)
    flood = FloodControl()
    for n in range(1_000):
        flood.take(named(f"made-up-{n}"), 100.0, room=True)
        if n % 50 == 0:
            flood.take(named("there"), 100.0, room=True)
    assert len(flood._names) == 100
    assert [each.detail for each in flood.end(100.0)][1:] == [{"source": "there", "source_digest": None}]


def test_a_summed_query_is_still_a_query() -> None:
    """Whose refusal pauses no feed."""
    flood = FloodControl()
    for n in range(ROWS_EACH + 5):
        flood.take(refusal(detail={"status": 403, "query": True, "n": n}), 100.0, room=True)
        flood.take(refusal(detail={"status": 403, "n": n}), 100.0, room=True)
    assert [(each.count, each.detail) for each in flood.end(100.0)] == [(5, {"query": True}), (5, None)]


def test_without_room_everything_is_only_counted() -> None:
    """The database is away and what waits for it fills the memory: no minute ends, and nothing is let through."""
    flood = FloodControl()
    assert [flood.take(refusal(), now, room=False) for now in (100.0, 200.0, 300.0)] == [[], [], []]
    assert [each.count for each in flood.take(refusal(peer="192.0.2.2"), 301.0, room=True)] == [3, 1]


def repeat(number: int = 1, **changes: Any) -> AuditEvent:
    """A message that came again."""
    return replace(
        AuditEvent(
            action="message.receive",
            outcome="duplicate",
            at=NOW,
            actor="redox",
            peer="192.0.2.1",
            destination="clinic",
            message_uuid=UUID(int=number),
            detail={"attempt": "a"},
        ),
        **changes,
    )


def test_the_first_repeats_of_a_minute_have_a_row_each() -> None:
    """So many for one destination; what they have changed, and what is new, always."""
    repeats = Repeats()
    new, changed = repeat(outcome="accepted"), repeat(detail={"taken_up": ["dead"]})
    for _ in range(3):
        audited, counted = repeats.split([*[repeat()] * 40, new, changed], 100.0)
        repeats.written(audited)
    assert (len(audited), len(counted)) == (REPEATS - 80 + 2, 20)
    assert audited[-2:] == [new, changed]
    assert repeats.split([repeat(destination="ward")], 100.0) == ([repeat(destination="ward")], [])
    assert repeats.split([repeat()], 159.9) == ([], [repeat()])
    assert repeats.split([repeat()], 160.0) == ([repeat()], [])


def test_what_was_not_committed_was_not_told() -> None:
    """The same batch, written once more, has the same rows."""
    repeats = Repeats()
    for _ in range(2):
        assert repeats.split([repeat()] * REPEATS, 100.0) == ([repeat()] * REPEATS, [])


def test_repeats_are_counted_by_message() -> None:
    """Which one it was is still told, where it was one."""
    flood = FloodControl()
    for _ in range(ROWS_EACH + 7):
        flood.take(repeat(7), 100.0, room=True)
    (summed,) = flood.end(100.0)
    assert (summed.message_uuid, summed.count, summed.outcome, summed.detail) == (UUID(int=7), 7, "duplicate", None)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30), st.booleans()), max_size=400))
def test_no_refusal_is_ever_lost_or_told_twice(steps: list[tuple[int, int, bool]]) -> None:
    """The counts add up for every sender and time, with space in the table or without."""
    flood, now, audited = FloodControl(), 100.0, 0
    for peer, seconds, room in steps:
        now += seconds
        audited += sum(
            each.count for each in flood.take(refusal(peer=f"10.0.{peer // 200}.{peer % 200}"), now, room=room)
        )
    assert audited + sum(each.count for each in flood.end(now)) == len(steps)


@pytest.mark.parametrize(
    ("peer", "named"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unknown"),
        ("unix:", "unknown"),
        ("192.0.2.1, 10.0.0.1", "unknown"),
    ],
)
def test_a_flood_is_counted_by_network(peer: str, named: str) -> None:
    """An IPv4 address, the /64 that one subscriber has, or `unknown`."""
    assert network(peer) == named


def test_a_summed_row_says_which_network(keyring: Keyring) -> None:
    """It is a row like any other."""
    flood = FloodControl()
    for _ in range(ROWS_EACH + 1):
        flood.take(refusal(peer="2001:db8::1"), 100.0, room=True)
    row = AuditChain(keyring, Sealer(keyring)).rows(flood.end(100.0))[0]
    assert (row["peer"], row["count"], row["detail"], row["reason"]) == ("2001:db8::/64", 1, None, "token_wrong")


def strangers(flood: FloodControl, now: float, count: int) -> list[AuditEvent]:
    """The rows that a minute from `now` on makes, in which so many strangers knock, each from another network."""
    rows = [
        row
        for number in range(count)
        for row in flood.take(refusal(peer=f"10.{number % 250}.{number // 250}.1"), now, room=True)
    ]
    return rows + flood.due(now + 60)


def test_strangers_who_go_on_get_ever_fewer_rows() -> None:
    """Each minute that uses up the allowance halves it, down to one summary row; nothing of it is lost."""
    flood = FloodControl()
    flood.end(0.0)
    minutes = [strangers(flood, 60.0 * minute, 2_000) for minute in range(12)]
    sizes = [len(rows) for rows in minutes]
    assert sizes[0] == 2 * ROWS_IN_ALL + 1
    assert all(after <= before // 2 + 1 for before, after in pairwise(sizes))
    assert sizes[-2:] == [1, 1]
    assert all(sum(each.count for each in rows) == 2_000 for rows in minutes)


def test_the_allowance_is_given_back_after_an_hour() -> None:
    """Not before; and a stranger now and then does not keep it from coming back."""
    flood = FloodControl()
    flood.end(0.0)
    for minute in range(12):
        strangers(flood, 60.0 * minute, 2_000)
    for minute in range(12, 71):
        assert [each.count for each in strangers(flood, 60.0 * minute, 2)] == [2]
    flood.due(60.0 * 72)
    assert [each.count for each in strangers(flood, 60.0 * 73, 2)] == [1, 1]


def test_strangers_take_nothing_from_who_holds_a_credential() -> None:
    """Redox's own refusals, by which a feed stands still, are told by name however long a flood lasts."""
    flood = FloodControl()
    flood.end(0.0)
    for minute in range(12):
        strangers(flood, 60.0 * minute, 2_000)
    known = [flood.take(refusal(actor="redox", reason="source_unknown"), 721.0, room=True) for _ in range(ROWS_EACH)]
    assert all(len(each) == 1 for each in known)
