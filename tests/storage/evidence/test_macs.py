"""MACs and digests: vectors worked out by hand, so that the encoding can never change unseen, and round trips."""

from __future__ import annotations

import hmac
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import CheckConstraint, Engine, Table, insert, select

from receiver.keyring import Key, Keyring
from receiver.storage import schema
from receiver.storage.evidence.macs import COLUMNS, KeyedDigests, chain, encode, mac_key, row_mac

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = bytes(range(32))
MICROSECONDS = 1767225600_000000  # 2026-01-01T00:00:00Z since 1970: 20,454 days of 86,400 seconds


def test_the_encoding_is_what_it_was() -> None:
    """Written by hand. Were it ever to change, no row that exists would prove anything any more."""
    assert encode("t", None, True, 7, NOW, b"\x00\xff", UUID(int=1), ["a", 2], {"b": 1, "a": None}, 0.1, 'ü"\n\0') == (
        b'["t",null,true,7,1767225600000000,"AP8=","00000000-0000-0000-0000-000000000001",["a",2],{"a":null,"b":1},'
        b'"0.1","\xc3\xbc\\"\\n\\u0000"]'
    )


def test_a_message_is_signed_as_written_by_hand() -> None:
    """HMAC-SHA256 over that text; the digest itself was worked out with openssl."""
    row = {
        "uuid": UUID("01890a5d-ac96-774b-bcce-b302099a8057"),
        "destination_id": 3,
        "credential_ids": [4, 5],
        "source_id": "11111111-1111-4111-8111-111111111111",
        "kind": "PatientAdmin.Arrival",
        "query": False,
        "test": True,
        "log_id": "log-1",
        "attempt_id": None,
        "message_id": None,
        "transmission_id": "7",
        "facility": "Ü",
        "event_time": NOW + timedelta(microseconds=1),
        "received_at": NOW,
        "peer": "192.0.2.1",
        "digest": bytes(32),
        "size": 4096,
        "content_type": "application/json",
        "state": "not under the MAC",
    }
    by_hand = (
        '["messages","01890a5d-ac96-774b-bcce-b302099a8057",3,[4,5],"11111111-1111-4111-8111-111111111111",'
        '"PatientAdmin.Arrival",false,true,"log-1",null,null,"7","Ü",1767225600000001,1767225600000000,"192.0.2.1",'
        '"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",4096,"application/json"]'
    ).encode()
    assert row_mac(KEY, "messages", row) == hmac.digest(KEY, by_hand, "sha256")
    assert row_mac(KEY, "messages", row).hex() == ("c93f69d563b441e4afbb2bf562c53fca297effd3c699e0bad0e6aa13c714700a")


def test_an_audit_row_is_signed_over_the_one_before_as_written_by_hand() -> None:
    """The MAC before goes first, as 32 bytes."""
    row = {
        "writer": UUID(int=2),
        "n": 2,
        "at": NOW,
        "action": "message.refuse",
        "outcome": "refused",
        "reason": "token_wrong",
        "actor": "unverified",
        "peer": None,
        "destination": "clinic",
        "message_uuid": None,
        "subject": None,
        "count": 12,
        "detail": '{"status":401}',
        "note": b"\x01",
        "note_key": "secret-1",
    }
    by_hand = (
        b'["audit_events","00000000-0000-0000-0000-000000000002",2,1767225600000000,"message.refuse","refused",'
        b'"token_wrong","unverified",null,"clinic",null,null,12,"{\\"status\\":401}","AQ==","secret-1"]'
    )
    previous = bytes(range(32, 64))
    assert row_mac(KEY, "audit_events", row, previous=previous) == hmac.digest(KEY, previous + by_hand, "sha256")
    assert row_mac(KEY, "audit_events", row, previous=previous).hex() == (
        "f40c1b32e3ae114886eb848ce321ac52afa8b338bd0afdfbac8d6bc908409e19"
    )


def test_a_chain_signs_each_row_over_the_one_before() -> None:
    """The last MAC is what the next chain piece begins with."""
    rows: list[dict[str, Any]] = [dict.fromkeys(COLUMNS["audit_events"], n) for n in range(3)]
    last = chain(KEY, rows, b"before")
    assert rows[0]["mac"] == row_mac(KEY, "audit_events", rows[0], previous=b"before")
    assert rows[2]["mac"] == last == row_mac(KEY, "audit_events", rows[2], previous=rows[1]["mac"])


def test_equal_times_are_equal_whatever_their_zone() -> None:
    """A database answers in its own."""
    assert encode(NOW) == encode(NOW.astimezone(timezone(timedelta(hours=-5)))) == f"[{MICROSECONDS}]".encode()
    assert encode(datetime(1, 1, 1, tzinfo=UTC)) == b"[-62135596800000000]"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
)


@given(st.lists(VALUES, max_size=4))
def test_an_encoding_can_be_read_back(values: list[Any]) -> None:
    """So no two rows share one: nothing can be moved from a column to its neighbour without another MAC."""
    assert json.loads(encode(*values)) == values


# --- what PostgreSQL gives back

TIMES = st.timedeltas(timedelta(days=-30_000), timedelta(days=30_000)).map(lambda delta: NOW + delta)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NUMBERS = st.integers(1, 2**62)


def _rows(table: Table) -> st.SearchStrategy[dict[str, Any]]:
    """Whatever the table's columns can hold, as a writer has it in hand."""
    special: dict[str, st.SearchStrategy[Any]] = {
        "credential_ids": st.lists(NUMBERS, max_size=3),
        # The accuracy of a REAL: what a handler is declared with.
        "timeout": st.integers(1, 999_999).map(lambda n: n / 1000),
    }
    for check in table.constraints:
        if isinstance(check, CheckConstraint):
            name, _, values = str(check.sqltext).partition(" IN ")
            special[name] = st.sampled_from(re.findall(r"'(\w+)'", values))
    kinds = {
        "BigInteger": NUMBERS,
        "Integer": st.integers(0, 2**31 - 1),
        "Text": TEXTS,
        "Boolean": st.booleans(),
        "UUID": st.uuids(),
        "DateTime": TIMES,
        "LargeBinary": st.binary(max_size=40),
        "ARRAY": st.lists(TEXTS, max_size=3),
        "JSONB": st.dictionaries(TEXTS, TEXTS | st.booleans() | st.integers(-(2**53), 2**53), max_size=3),
    }
    made = {}
    for column in table.c:
        strategy = special[column.name] if column.name in special else kinds[type(column.type).__name__]
        made[column.name] = st.none() | strategy if column.nullable else strategy
    return st.fixed_dictionaries(made)


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_what_the_database_gives_back_has_the_same_mac(engine: Engine, name: str) -> None:
    """Microseconds, nulls, arrays, objects in any order, and numbers of single accuracy: nothing is lost on the way."""
    table = schema.metadata.tables[name]

    @given(_rows(table))
    @settings(max_examples=60, deadline=None)
    def holds(row: dict[str, Any]) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # no foreign keys here
            values = {key: value for key, value in row.items() if key != "id"}
            number = connection.execute(insert(table).values(values).returning(table.c.id)).scalar_one()
            stored = connection.execute(select(table).where(table.c.id == number)).mappings().one()
            connection.rollback()
        assert row_mac(KEY, name, {**stored}) == row_mac(KEY, name, row | {"id": number})

    holds()


@pytest.mark.parametrize("timeout", [0.1, 17.3, 60.0, 1 / 3, 3599.999])
def test_a_number_of_single_accuracy_is_signed_as_it_stands(engine: Engine, timeout: float) -> None:
    """Whatever was written, what is read is read the same each time, by cursors of either kind."""
    table = schema.subscriptions
    with engine.connect() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        number = connection.execute(
            insert(table)
            .values(
                destination_id=1,
                handler="h",
                role="handler",
                patterns=["*"],
                ordering="none",
                acknowledge="after_commit",
                on_failure="dead",
                max_attempts=1,
                timeout=timeout,
                mac=b"",
                mac_key="",
            )
            .returning(table.c.id)
        ).scalar_one()
        query = select(table).where(table.c.id == number)
        plain = connection.execute(query).mappings().one()
        streamed = connection.execute(query.execution_options(yield_per=10)).mappings().one()
        assert row_mac(KEY, "subscriptions", {**plain}) == row_mac(KEY, "subscriptions", {**streamed})


# --- keys and digests


def test_each_use_has_a_key_of_its_own() -> None:
    """Rows, tokens, patients and seals share a file, not a key."""
    keyring = Keyring([Key(id="index-1", purpose="index", created=NOW, secret=KEY)])
    keys = [
        mac_key(keyring["index-1"]),
        *(keyring["index-1"].derive(use) for use in ("content", "source", "message key", "outside")),
        KEY,
        *(keyring["index-1"].derive(use) for use in ("verification token", "client secret", "patient", "seal")),
    ]
    assert len(set(keys)) == len(keys)


def test_a_patients_digest_is_worked_out_by_hand() -> None:
    """It is looked up for ever: HMAC-SHA256 of (authority, type, identifier) as JSON, under a derived key."""
    key = Key(id="index-1", purpose="index", created=NOW, secret=KEY)
    extracted = hmac.digest(bytes(32), KEY, "sha256")
    derived = hmac.digest(extracted, b"redox-receiver patient\x01", "sha256")
    digests = KeyedDigests(Keyring([key]))
    by_hand = hmac.digest(derived, b'["urn:oid:1.2.3","MR","0000000001"]', "sha256")
    assert digests.patient("urn:oid:1.2.3", "MR", "0000000001") == by_hand
    assert by_hand.hex() == "61b3a0534522558c350f08c629750502b281a8a4e4492fef229e4ba68c618e99"


def test_a_digest_tells_type_and_identifier_apart(keyring: Keyring) -> None:
    """The same number of another type or authority is another patient's; no text moves from one part to the next."""
    digests = KeyedDigests(keyring)
    parts = [("a", "MR", "1"), ("b", "MR", "1"), ("a", "EPI", "1"), ("a", "MR", "2"), ("a", "", "1"), (None, "MR", "1")]
    parts += [("a\0MR", "1", ""), ("", "a\0MR", "1"), ('a","MR', "1", "")]
    assert len({digests.patient(*each) for each in parts}) == len(parts)
    assert b"12345" not in digests.patient("a", "MR", "12345")


def test_no_digest_of_content_is_a_bare_one(keyring: Keyring) -> None:
    """Each use has a key of its own, so that one column says nothing of another; and no column is a plain SHA-256."""
    digests, value = KeyedDigests(keyring), sha256(b"x").digest()
    made = [
        digests.content(b"x"),
        digests.message_key(value),
        digests.outside(value),
        digests.source("x"),
        digests.patient(None, "", "x"),
    ]
    assert digests.content(b"x") == digests.content_of(value)
    assert len({value, sha256(value).digest(), *made}) == 7
