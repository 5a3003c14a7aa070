"""Seals: what has committed is in the tree once, in whatever order it commits, and what is taken away is missed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pymerkle
import pytest
from sqlalchemy import Connection, Engine, text
from structlog.testing import capture_logs

from receiver.errors import Conflict, NotFound, ProofInvalid
from receiver.keyring import Keyring, create
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import seals
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.proofs import newest_checkpoint, prove_growth, prove_row, public_keys
from receiver.storage.evidence.seals import AuditSealer, Seal, SealBody
from receiver.storage.evidence.verify import VerificationResult, verify
from receiver.storage.operations.disclosure import disclose
from receiver.transparency.proof_file import ConsistencyProof, InclusionProof
from tests.storage.door import Door, body, handler
from tests.storage.hand import arrive


@pytest.fixture
def sealer(engine: Engine, keyring: Keyring) -> AuditSealer:
    return AuditSealer(engine, keyring)


class Writer:
    """A process that writes audit rows, and may keep its transaction open."""

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        self.chain = AuditChain(keyring, Sealer(keyring))

    @contextmanager
    def writing(self, count: int = 1) -> Iterator[Connection]:
        """Write rows, which are not committed while the block runs."""
        event = AuditEvent(action="a.b", outcome="done", at=datetime.now(UTC), actor="somebody")
        with self._engine.begin() as connection:
            write(connection, self.chain, [event] * count)
            yield connection

    def write(self, count: int = 1) -> None:
        """Write rows, and commit."""
        with self.writing(count):
            pass


@pytest.fixture
def writer(engine: Engine, keyring: Keyring) -> Callable[[], Writer]:
    return lambda: Writer(engine, keyring)


def proved(engine: Engine, keyring: Keyring, **options: Any) -> VerificationResult:
    with engine.connect() as connection:
        return verify(connection, keyring, **options)


def sealed(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT coalesce(max(size), 0) FROM audit_seals")) or 0)


# --- what is sealed


def test_rows_are_sealed_once_in_the_order_of_their_writers(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer]
) -> None:
    """Each seal adds what came since, the tree is another library's, and nothing is left to seal."""
    one, two = writer(), writer()
    for count in (1, 3, 2):
        one.write(count)
        two.write(count)
        made = sealer.seal()
        assert isinstance(made, Seal)
        assert made.added == 2 * count
    assert sealer.seal() is None
    assert AuditSealer(engine, keyring).seal() is None
    oracle = pymerkle.InmemoryTree(algorithm="sha256")
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT e.mac FROM audit_events e JOIN audit_seal_writers s "
                "ON s.writer = e.writer AND e.n BETWEEN s.first_n AND s.last_n ORDER BY s.first_leaf, e.n"
            )
        )
        for row in rows:
            oracle.append_entry(bytes(row.mac))
        stored = connection.execute(text("SELECT size, root FROM audit_seals ORDER BY n")).all()
    assert [(row.size, bytes(row.root)) for row in stored] == [(n, oracle.get_root(n)) for n in (2, 8, 12)]
    assert proved(engine, keyring) == VerificationResult(rows=12, writers=2, first_bad=None, seals=3, sealed=12)


def test_a_row_that_commits_late_is_sealed_later(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer]
) -> None:
    """Its number was given before that of rows that are sealed already. Also after the sealer has moved on."""
    late, other = writer(), writer()
    with late.writing(2):
        for _ in range(4):
            other.write()
            assert sealer.seal() is not None
    made = sealer.seal()
    assert made is not None
    assert (made.added, made.size) == (2, 6)
    assert proved(engine, keyring).sealed == 6


def test_what_is_decided_is_not_read_again(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer]
) -> None:
    """The numbers below which nothing can come any more go on when the transactions that hold them have ended."""

    def decided() -> int:
        with engine.connect() as connection:
            found = connection.scalar(text("SELECT body FROM audit_seals ORDER BY n DESC LIMIT 1"))
        return SealBody.decode(str(found)).decided

    late, other = writer(), writer()
    other.write()
    sealer.seal()
    assert decided() == 1
    with late.writing() as connection:  # holds number 2, which will never exist
        other.write()
        sealer.seal()
        assert decided() == 1
        connection.rollback()
    other.write()
    sealer.seal()
    other.write()
    sealer.seal()
    assert decided() >= 3
    assert proved(engine, keyring).sealed == 4


def test_many_hosts_seal_each_row_once(engine: Engine, keyring: Keyring, writer: Callable[[], Writer]) -> None:
    """While others write. One seals at a time; another lets it be, or waits for it."""
    writers = [writer() for _ in range(4)]

    def seal(wait: bool) -> None:
        mine = AuditSealer(engine, keyring)
        for _ in range(20):
            mine.seal(wait=wait)

    def repeatedly(mine: Writer) -> None:
        for _ in range(25):
            mine.write()

    with ThreadPoolExecutor(7) as threads:
        jobs = [threads.submit(seal, wait) for wait in (True, False, False)]
        jobs += [threads.submit(repeatedly, each) for each in writers]
        for job in jobs:
            job.result(60)
    AuditSealer(engine, keyring).seal(wait=True)
    found = proved(engine, keyring)
    assert (found.first_bad, found.rows, found.sealed) == (None, 100, 100)


def test_more_than_one_seal_holds_is_sealed_by_the_next(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tiles are filled across their edges: 256 hashes are one hash of the level above."""
    monkeypatch.setattr(seals, "MOST", 200)
    monkeypatch.setattr(seals, "_UNSEALED", seals._UNSEALED.replace("LIMIT 20000", "LIMIT 200"))
    one = writer()
    one.write(700)
    sizes = []
    while (made := sealer.seal()) is not None:
        sizes.append(made.size)
    assert sizes == [200, 400, 600, 700]
    with engine.connect() as connection:
        tiles = connection.execute(text("SELECT level, number, length(hashes) / 32 FROM audit_tiles ORDER BY 1, 2"))
        assert [tuple(row) for row in tiles] == [(0, 0, 256), (0, 1, 256), (0, 2, 188), (1, 0, 2)]
    assert proved(engine, keyring).first_bad is None


def test_each_seal_is_a_log_line_with_its_checkpoint(sealer: AuditSealer, writer: Callable[[], Writer]) -> None:
    """What the log stream has kept cannot be taken back with the database."""
    writer().write()
    with capture_logs() as lines:
        made = sealer.seal()
    assert made is not None
    assert [(line["event"], line["id"], line["checkpoint"]) for line in lines] == [("audit.sealed", 1, made.checkpoint)]


def test_a_disclosure_is_shown_after_it_is_sealed(
    door: Door, ledger: MessageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is returned when the seal cannot be made: the row is there, and the content was not shown."""
    (number,) = arrive(door, ledger, body())
    content = disclose(door.engine, door.keyring, number, door.now, actor="a@b", reason="why")
    assert content == body()
    place = "SELECT id FROM audit_events WHERE action = 'message.disclose' ORDER BY id DESC LIMIT 1"
    with door.engine.connect() as connection:
        assert prove_row(connection, door.value(place)).verify(
            *public_keys(connection, door.keyring).values()
        ).size == sealed(door.engine)
    door.rows("ALTER TABLE audit_seals ADD CONSTRAINT stop CHECK (n < 2)")
    with pytest.raises(Exception, match="CheckViolation"):
        disclose(door.engine, door.keyring, number, door.now, actor="a@b", reason="why")


# --- what is proved


def test_a_row_is_proved_to_a_stranger(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer]
) -> None:
    """With the public key alone. An unsealed row, and one that is not there, have no proof."""
    one = writer()
    one.write(5)
    with engine.connect() as connection, pytest.raises(NotFound, match="no audit row is sealed"):
        prove_row(connection, 1)
    sealer.seal()
    one.write()
    with engine.connect() as connection:
        (key,) = public_keys(connection, keyring).values()
        for number in range(1, 6):
            file = prove_row(connection, number).text()
            assert InclusionProof.parse(file).verify(key).size == 5
        with pytest.raises(Conflict, match="not sealed yet"):
            prove_row(connection, 6)
        with pytest.raises(NotFound):
            prove_row(connection, 99)


def test_a_checkpoint_is_proved_to_extend_an_earlier_one(
    engine: Engine, keyring: Keyring, sealer: AuditSealer, writer: Callable[[], Writer]
) -> None:
    """Nothing that the earlier one covered was changed or taken away."""
    one = writer()
    one.write(3)
    sealer.seal()
    with engine.connect() as connection:
        earlier = newest_checkpoint(connection)
    one.write(10)
    sealer.seal()
    with engine.connect() as connection:
        (key,) = public_keys(connection, keyring).values()
        file = prove_growth(connection, keyring, earlier).text()
        before, after = ConsistencyProof.parse(file).verify(key)
        assert (before.size, after.size) == (3, 13)
        with pytest.raises(ProofInvalid):
            prove_growth(connection, keyring, earlier.replace("\n3\n", "\n2\n"))


def test_keys_change_and_older_checkpoints_hold(engine: Engine, keyring: Keyring, writer: Callable[[], Writer]) -> None:
    """After `keys new seal` each seal proves by the key that signed it; a keyring that lacks one says so."""
    one = writer()
    one.write()
    AuditSealer(engine, keyring).seal()
    with engine.connect() as connection:
        earlier = newest_checkpoint(connection)
    later = keyring.with_new("seal", datetime.now(UTC))
    one.write()
    AuditSealer(engine, later).seal()
    assert proved(engine, later).first_bad is None
    assert proved(engine, later, checkpoint=earlier).first_bad is None
    key = later.current("seal").id
    assert proved(engine, keyring).first_bad == (f"audit_seals n 2: signed with key {key}, which this keyring lacks")
    with engine.connect() as connection:
        assert list(public_keys(connection, later)) == [each.id for each in later.keys if each.purpose == "seal"]


# --- what is missed


@pytest.fixture
def attacked(door: Door, ledger: MessageLedger) -> Door:
    """Messages and commands, sealed twice, and rows that no trigger protects any more."""
    door.enable(handler())
    mine = AuditSealer(door.engine, door.keyring)
    arrive(door, ledger, *(body(f"log-{n}") for n in range(3)))
    mine.seal(wait=True)
    arrive(door, ledger, *(body(f"log-{n}") for n in range(3, 6)))
    ledger.stop()
    for _ in range(2):
        Writer(door.engine, door.keyring).write()
    mine.seal(wait=True)
    for table in ("audit_events", "audit_seals", "audit_seal_writers"):
        door.rows(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    return door


def bad(door: Door, **options: Any) -> str:
    found = proved(door.engine, door.keyring, **options).first_bad
    assert found is not None
    return found


def test_what_nobody_touched_holds(attacked: Door) -> None:
    """Every audit row is sealed."""
    found = proved(attacked.engine, attacked.keyring)
    assert found.first_bad is None
    assert found.sealed == attacked.value("SELECT count(*) FROM audit_events")


def test_a_chain_of_one_row_that_nothing_follows_is_missed(attacked: Door) -> None:
    """Attack: a disclosure is erased. Each command is a writer of one row, and this one was the last."""
    writer = attacked.rows("DELETE FROM audit_events WHERE id = (SELECT max(id) FROM audit_events) RETURNING writer")
    assert bad(attacked) == f"audit_events writer {writer[0].writer}, n 1: deleted after it was sealed (seal 2)"


def test_a_tail_that_is_cut_with_its_messages_is_missed(attacked: Door) -> None:
    """Attack: the newest rows of the feed's writer vanish, and the messages that they tell of."""
    (writer,) = attacked.rows("SELECT DISTINCT writer FROM audit_events WHERE action = 'message.receive'")[0]
    attacked.rows(
        "DELETE FROM messages WHERE uuid IN (SELECT message_uuid FROM audit_events WHERE writer = :w AND n > 4)",
        w=writer,
    )
    attacked.rows("DELETE FROM audit_events WHERE writer = :w AND n > 4", w=writer)
    # Nothing may follow what was deleted: else that would be named.
    if attacked.rows("SELECT 1 FROM audit_events WHERE follows NOT IN (SELECT id FROM audit_events)"):
        attacked.rows("DELETE FROM audit_events WHERE follows NOT IN (SELECT id FROM audit_events)")
    assert "deleted" in bad(attacked)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM audit_seals WHERE n = 1", "audit_seals n 1: deleted; the next one is n 2"),
        ("UPDATE audit_seals SET size = size - 1 WHERE n = 2", "audit_seals n 2: edited; its columns are not"),
        ("UPDATE audit_seals SET root = sha256(root) WHERE n = 2", "audit_seals n 2: edited; its columns are not"),
        ("UPDATE audit_seals SET body = replace(body, 'decided', 'x') WHERE n = 1", "audit_seals n 1: edited"),
        (
            "UPDATE audit_seals SET checkpoint = replace(checkpoint, 'redox', 'rodex') WHERE n = 1",
            "audit_seals n 1: edited, or inserted without the key",
        ),
        ("DELETE FROM audit_seal_writers WHERE seal = 2", "audit_seal_writers seal 2: rows were edited"),
        ("UPDATE audit_seal_writers SET last_n = last_n + 1 WHERE seal = 1", "audit_seal_writers seal 1: rows were"),
        ("UPDATE audit_tiles SET hashes = sha256('x') || substr(hashes, 33)", "audit_seals n 1: the leaf hashes"),
        ("UPDATE audit_tiles SET hashes = substr(hashes, 33)", "audit_"),
        ("DELETE FROM audit_tiles", "audit_tiles level 0, number 0: deleted"),
    ],
)
def test_what_is_done_to_the_seals_is_named(attacked: Door, statement: str, named: str) -> None:
    """Edited, deleted, or cut short."""
    attacked.rows(statement)
    assert bad(attacked).startswith(named)


def test_a_database_that_was_rolled_back_is_missed_by_who_kept_a_checkpoint(attacked: Door) -> None:
    """Attack: seals, rows and messages of the last minutes vanish together, and the tree is that of before."""
    with attacked.engine.connect() as connection:
        kept = newest_checkpoint(connection)
    first = attacked.rows("SELECT size FROM audit_seals WHERE n = 1")[0].size
    attacked.rows(
        "WITH late AS (SELECT e.id, e.message_uuid FROM audit_events e JOIN audit_seal_writers s ON s.writer = "
        "e.writer AND e.n BETWEEN s.first_n AND s.last_n WHERE s.seal = 2), m AS (DELETE FROM messages WHERE uuid IN "
        "(SELECT message_uuid FROM late)) DELETE FROM audit_events WHERE id IN (SELECT id FROM late)"
    )
    attacked.rows("DELETE FROM audit_seals WHERE n = 2")
    attacked.rows("DELETE FROM audit_seal_writers WHERE seal = 2")
    attacked.rows("UPDATE audit_tiles SET hashes = substr(hashes, 1, :end)", end=32 * first)
    assert proved(attacked.engine, attacked.keyring).first_bad is None  # by itself it says nothing
    assert "rows were deleted, or an older copy of the database was restored" in bad(attacked, checkpoint=kept)


def test_a_revoked_credential_that_is_put_back_is_missed(attacked: Door) -> None:
    """Attack: the old row, whose MAC holds, stands again where the revoked one was: before and after another seal."""
    old = attacked.rows("SELECT * FROM credentials")[0]._mapping
    attacked.registration.revoke_credential(old["id"], attacked.now)
    mine = AuditSealer(attacked.engine, attacked.keyring)
    mine.seal(wait=True)
    attacked.rows("UPDATE credentials SET revoked_at = NULL, mac = :mac WHERE id = :id", mac=old["mac"], id=old["id"])
    version = attacked.value("SELECT version FROM registry_version")
    assert bad(attacked) == (
        f"registry version {version}: a row was changed, inserted, deleted or put back after seal 3, without a "
        "recorded change"
    )
    Writer(attacked.engine, attacked.keyring).write()
    with capture_logs() as lines:
        mine.seal(wait=True)
    assert "audit.registry_changed" in [line["event"] for line in lines]
    assert bad(attacked).startswith(f"registry version {version}: a row was changed")
    assert "before seal 4" in bad(attacked)
    attacked.rows("UPDATE registry_version SET version = version - 1")
    assert "before seal 4" in bad(attacked)


def test_a_registry_row_that_is_deleted_is_missed(attacked: Door) -> None:
    """Attack: a source that was disabled, or any other row."""
    attacked.rows("DELETE FROM subscriptions")
    assert bad(attacked).startswith("registry version ")


def test_a_recorded_change_of_the_registry_is_no_fault(attacked: Door) -> None:
    """Sealed or not: each increments the version."""
    attacked.enable(handler("another"))
    assert proved(attacked.engine, attacked.keyring).first_bad is None
    AuditSealer(attacked.engine, attacked.keyring).seal(wait=True)
    assert proved(attacked.engine, attacked.keyring).first_bad is None


def test_an_inserted_row_does_not_stop_the_seals(attacked: Door) -> None:
    """Somebody without the key takes a writer's numbers: its own rows are sealed all the same."""
    writer = Writer(attacked.engine, attacked.keyring)
    writer.write()
    attacked.rows(
        "INSERT INTO audit_events (writer, n, at, action, outcome, actor, mac, mac_key) "
        "SELECT writer, unnest(ARRAY[1, 99]), now(), action, outcome, actor, mac, mac_key FROM audit_events "
        "WHERE writer = :w",
        w=writer.chain.head[0],
    )
    mine = AuditSealer(attacked.engine, attacked.keyring)
    mine.seal_row(writer.chain.head[0], 1)
    writer.write()
    mine.seal_row(writer.chain.head[0], 2)
    assert str(writer.chain.head[0]) in bad(attacked)


def test_a_checkpoint_of_another_log_is_refused(attacked: Door) -> None:
    """It says nothing of this one."""
    with attacked.engine.connect() as connection, pytest.raises(ProofInvalid):
        verify(connection, attacked.keyring, checkpoint="nonsense")
    other = create(datetime.now(UTC))
    with attacked.engine.connect() as connection:
        assert "which this keyring lacks" in str(verify(connection, other).first_bad)


def test_the_body_is_what_the_documents_say(attacked: Door) -> None:
    """JSON with sorted keys, whose SHA-256 is in the checkpoint's fourth line."""
    row = attacked.rows("SELECT * FROM audit_seals WHERE n = 2")[0]
    found = json.loads(row.body)
    assert sorted(found) == ["at", "decided", "log", "n", "previous", "registry", "rows", "system"]
    lines = row.checkpoint.split("\n")
    assert lines[0] == f"redox-receiver/{found['log']}"
    assert lines[1] == str(row.size)
    assert lines[3] == seals.extension(2, row.body)
    assert lines[4] == ""
    heads = {each[0]: each[4] for each in found["rows"]}
    for writer, mac in heads.items():
        stored = attacked.value("SELECT mac FROM audit_events WHERE writer = :w ORDER BY n DESC LIMIT 1", w=writer)
        assert bytes(stored).hex() == mac
