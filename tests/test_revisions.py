"""Every revision can be taken while the feed runs, and while older code still works: its SQL is read, as it was run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from alembic.script import Script, ScriptDirectory
from sqlalchemy import event

from receiver.database import migrations
from receiver.database.engine import open_engine
from receiver.storage.queue.partitions import TABLES
from tests.support.postgres import drop_database, new_database
from tests.test_migrations import LATER, ROOT

# What the feed or the workers write to all the time, and what grows for years.
HOT: Final = frozenset(
    {
        "messages",
        "message_keys",
        "payloads",
        "patient_digests",
        "patient_index_attempts",
        "deliveries",
        "delivery_attempts",
        "lanes",
        "audit_events",
        "outbound_requests",
        "credentials",
        "seen_once",
        "procrastinate_jobs",
    }
)

# Of a partitioned table this makes an index that is not valid yet; each partition gets its part concurrently.
_EMPTY_INDEX: Final = re.compile(rf"CREATE INDEX (IF NOT EXISTS )?\w+ ON ONLY ({'|'.join(TABLES)})\b", re.IGNORECASE)
# A partition is as hot as its table.
_PARTITION: Final = re.compile(r"_(default|\d{8}|\d{4}q[1-4])$")

_TABLE: Final = re.compile(
    r"(?:ALTER TABLE (?:IF EXISTS )?(?:ONLY )?|UPDATE (?:ONLY )?|DELETE FROM (?:ONLY )?|INSERT INTO |LOCK (?:TABLE )?|"
    r"TRUNCATE (?:TABLE )?|CLUSTER |REINDEX TABLE |VACUUM FULL |"
    r"CREATE (?:UNIQUE )?INDEX (?:CONCURRENTLY )?(?:IF NOT EXISTS )?\w+ ON (?:ONLY )?)(?:\w+\.)?(\w+)",
    re.IGNORECASE,
)
_MADE: Final = re.compile(r"CREATE TABLE (?:IF NOT EXISTS )?(?:\w+\.)?(\w+)", re.IGNORECASE)
# On a table that is hot: what holds it locked for as long as it is large.
_SLOW: Final = (
    (r"^CREATE (UNIQUE )?INDEX (?!CONCURRENTLY)", "builds an index under a lock: CONCURRENTLY"),
    (r"ADD COLUMN .* DEFAULT (?!now\(\))[^,]*\(", "a default that differs from row to row rewrites the table"),
    (r"ADD COLUMN .* GENERATED (ALWAYS|BY DEFAULT) AS|ADD COLUMN \w+ (big|small)?serial", "rewrites the table"),
    (r"ALTER (COLUMN )?\w+ (SET DATA )?TYPE ", "may rewrite the table"),
    (r"ALTER (COLUMN )?\w+ SET NOT NULL", "reads the table: a CHECK that is NOT VALID, validated later"),
    (r"ADD (CONSTRAINT \w+ )?(CHECK|FOREIGN KEY)(?!.*NOT VALID)", "reads the table: NOT VALID, validated later"),
    (r"ADD (CONSTRAINT \w+ )?(UNIQUE|PRIMARY KEY)(?! USING INDEX)", "builds an index under a lock: USING INDEX"),
    (r"SET (TABLESPACE|LOGGED|UNLOGGED|ACCESS METHOD)", "rewrites the table"),
    (r"^(CLUSTER|VACUUM FULL|REINDEX|LOCK|TRUNCATE) ?", "locks everybody out"),
    (r"^(UPDATE|DELETE|INSERT) ", "moves rows within the step: do it in small batches outside of it"),
)
# Wherever: what older code may need, or trips over.
_TAKES_AWAY: Final = (
    r"^DROP (TABLE|SCHEMA|FUNCTION|VIEW|TYPE|SEQUENCE)",
    r"DROP COLUMN",
    r"\bRENAME (TO|COLUMN|CONSTRAINT)\b",
    r"ALTER (COLUMN )?\w+ (SET DATA )?TYPE ",
    r"ALTER (COLUMN )?\w+ SET NOT NULL",
    r"ALTER (COLUMN )?\w+ DROP DEFAULT",
    r"ADD COLUMN \w+ (?!.*DEFAULT).*NOT NULL",
    r"ADD (CONSTRAINT \w+ )?(CHECK|UNIQUE|FOREIGN KEY|PRIMARY KEY)",
    r"^CREATE UNIQUE INDEX",
    r"^CREATE (OR REPLACE )?TRIGGER",
)


def made_by(statements: Sequence[str]) -> set[str]:
    """The tables that these make: nobody writes to them yet."""
    return {found.group(1) for each in statements for found in _MADE.finditer(each)}


def slow(statements: Sequence[str]) -> list[str]:
    """What would hold up the feed, each with what is wrong with it."""
    made = made_by(statements)
    wrong = []
    for statement in statements:
        found = _TABLE.match(statement)
        if found is None or _EMPTY_INDEX.match(statement):
            continue
        if _PARTITION.sub("", found.group(1)) in HOT and found.group(1) not in made:
            wrong += [f"{statement[:120]}: {why}" for rule, why in _SLOW if re.search(rule, statement, re.IGNORECASE)]
    return wrong


def takes_away(statements: Sequence[str]) -> list[str]:
    """What code before it may not survive."""
    made = made_by(statements)
    wrong = []
    for statement in statements:
        found = _TABLE.match(statement)
        if found is None or found.group(1) not in made:
            wrong += [statement[:120] for rule in _TAKES_AWAY if re.search(rule, statement, re.IGNORECASE)]
    return wrong


@pytest.fixture(scope="module")
def steps() -> list[Script]:
    """The revisions, from the first on."""
    return list(ScriptDirectory.from_config(migrations.config()).walk_revisions())[::-1]


def heard_from(steps: list[Script]) -> dict[str, list[str]]:
    """What each revision runs on a new database, statement by statement, Alembic's own left out."""
    url = new_database()
    engine = open_engine(url, pooled=False)
    heard: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        plain = " ".join(re.sub(r"--[^\n]*", "", statement).split())
        if not re.match(r"SELECT|SET |COMMENT ON TABLE alembic_version|\w+ (INTO |FROM )?alembic_version", plain):
            heard.append(plain)

    found = {}
    for step in steps:
        heard.clear()
        migrations.upgrade(engine, step.revision)
        found[step.revision] = list(heard)
    engine.dispose()
    drop_database(url)
    return found


@pytest.fixture(scope="module")
def run(steps: list[Script]) -> dict[str, list[str]]:
    """What the revisions run."""
    return heard_from(steps)


def test_no_step_holds_up_the_feed(run: dict[str, list[str]]) -> None:
    """After the first, which nobody waits for."""
    assert {revision: wrong for revision, each in run.items() if revision != "0001" and (wrong := slow(each))} == {}


def test_a_step_is_heard_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release's step that holds up the feed, and takes away a column, is found by what it runs."""
    made, today = tmp_path / "migrations", migrations.head()
    shutil.copytree(ROOT / "migrations", made, ignore=shutil.ignore_patterns("__pycache__"))
    does = "op.create_index('ix_later', 'messages', ['kind']); op.drop_column('workers', 'pid')"
    (made / "versions" / "later.py").write_text(LATER.format(head=today, oldest=today, does=does, undoes="pass"))
    monkeypatch.setattr(migrations, "location", lambda: made)
    heard = heard_from(list(ScriptDirectory.from_config(migrations.config()).walk_revisions())[::-1])
    assert [each.partition(":")[0] for each in slow(heard["later"])] == ["CREATE INDEX ix_later ON messages (kind)"]
    assert takes_away(heard["later"]) == ["ALTER TABLE workers DROP COLUMN pid"]


def test_every_step_says_which_code_runs_on_it(steps: list[Script]) -> None:
    """One that is known by then, and never an older one than before."""
    order = [step.revision for step in steps]
    oldest = [order.index(step.module.oldest_code) for step in steps]
    assert oldest == sorted(oldest)
    assert all(found <= place for place, found in enumerate(oldest))


def test_what_takes_away_shuts_out_the_code_that_needs_it(steps: list[Script], run: dict[str, list[str]]) -> None:
    """Where a step takes something away, older code must have been named that does without."""
    before = steps[0].module.oldest_code
    for step in steps[1:]:
        if wrong := takes_away(run[step.revision]):
            assert step.module.oldest_code != before, wrong
        before = step.module.oldest_code


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE INDEX ix ON messages (kind)",
        "CREATE UNIQUE INDEX ix ON ONLY deliveries (id)",
        "CREATE INDEX ix ON ONLY lanes (epoch)",
        "ALTER TABLE messages ADD COLUMN token uuid DEFAULT gen_random_uuid() NOT NULL",
        "ALTER TABLE messages ADD COLUMN length integer GENERATED ALWAYS AS (size * 2) STORED",
        "ALTER TABLE ONLY messages ADD COLUMN n bigserial",
        "ALTER TABLE messages ALTER COLUMN size TYPE bigint",
        "ALTER TABLE deliveries ALTER COLUMN epoch SET NOT NULL",
        "ALTER TABLE lanes ADD CONSTRAINT c CHECK (epoch > 0)",
        "ALTER TABLE deliveries ADD FOREIGN KEY (message_id) REFERENCES messages (id)",
        "ALTER TABLE deliveries ADD CONSTRAINT u UNIQUE (lane)",
        "ALTER TABLE audit_events SET UNLOGGED",
        "UPDATE messages SET test = false",
        "DELETE FROM payloads_default",
        "CREATE INDEX ix ON messages_2026q4 (kind)",
        "LOCK TABLE lanes IN SHARE MODE",
        "VACUUM FULL messages",
        "CREATE INDEX ix ON procrastinate.procrastinate_jobs (id)",
    ],
)
def test_what_holds_up_the_feed_is_found(statement: str) -> None:
    """Each of these keeps everybody waiting for as long as the table is large."""
    assert slow([statement])


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix ON messages (kind)",
        "CREATE INDEX ix ON api_keys (name)",
        "CREATE INDEX IF NOT EXISTS ix ON ONLY messages (kind)",
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_2026q4 ON messages_2026q4 (kind)",
        "ALTER TABLE messages ADD COLUMN note text",
        "ALTER TABLE messages ADD COLUMN seen timestamptz DEFAULT now() NOT NULL",
        "ALTER TABLE messages ADD COLUMN n integer DEFAULT 0 NOT NULL",
        "ALTER TABLE lanes ADD CONSTRAINT c CHECK (epoch > 0) NOT VALID",
        "ALTER TABLE lanes VALIDATE CONSTRAINT c",
        "ALTER TABLE lanes SET (fillfactor = 50)",
    ],
)
def test_what_does_not_is_let_by(statement: str) -> None:
    """Were these refused, nothing could ever be changed."""
    assert slow([statement]) == []


def test_what_is_new_may_be_made_as_one_likes() -> None:
    """A table of the step's own has nobody who waits."""
    assert slow(["CREATE TABLE lanes (id bigint)", "CREATE UNIQUE INDEX ix ON lanes (id)"]) == []
    assert takes_away(["CREATE TABLE lanes (id bigint)", "CREATE UNIQUE INDEX ix ON lanes (id)"]) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE workers",
        "ALTER TABLE messages DROP COLUMN facility",
        "ALTER TABLE messages RENAME COLUMN a TO b",
        "ALTER TABLE workers ADD COLUMN x text NOT NULL",
        "ALTER TABLE workers ALTER COLUMN host TYPE bigint",
        "CREATE UNIQUE INDEX u ON workers (host)",
        "ALTER TABLE workers ADD CONSTRAINT c CHECK (pid > 1)",
    ],
)
def test_what_takes_away_is_found(statement: str) -> None:
    """Code that was written before it fails on each of these."""
    assert takes_away([statement])
    assert takes_away(["ALTER TABLE workers ADD COLUMN x text", "CREATE INDEX ix ON workers (host)"]) == []
