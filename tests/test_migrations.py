"""The schema's steps: up, down, up; in agreement with the tables; once, however many do it at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from receiver.database import compatibility, migrations
from receiver.database.engine import open_engine
from receiver.errors import ConfigurationError, Conflict
from receiver.storage.schema import metadata
from tests.support.postgres import drop_database, new_database

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def empty_url() -> Iterator[str]:
    """A database with nothing in it."""
    url = new_database()
    yield url
    drop_database(url)


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    """An engine on it."""
    engine = open_engine(empty_url, pooled=False)
    yield engine
    engine.dispose()


def shape(engine: Engine) -> list[str]:
    """Everything in the database that is not PostgreSQL's: relations, functions, triggers, constraints, schemas."""
    with engine.connect() as connection:
        return list(
            connection.execute(
                text("""
            SELECT concat_ws(' ', 'relation', c.oid::regclass, relkind, pg_get_indexdef(c.oid))
            FROM pg_class c WHERE relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
            UNION ALL
            SELECT concat_ws(' ', 'column', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull,
                             attidentity, pg_get_expr(adbin, adrelid))
            FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
            LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
            WHERE relnamespace::regnamespace::text !~ '^(pg_|information_schema)' AND attnum > 0 AND NOT attisdropped
            UNION ALL
            SELECT concat_ws(' ', 'function', oid::regprocedure) FROM pg_proc
            WHERE pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
            UNION ALL
            SELECT concat_ws(' ', 'trigger', pg_get_triggerdef(oid)) FROM pg_trigger WHERE NOT tgisinternal
            UNION ALL
            SELECT concat_ws(' ', 'constraint', conname, pg_get_constraintdef(oid)) FROM pg_constraint
            WHERE connamespace::regnamespace::text !~ '^(pg_|information_schema)'
            UNION ALL
            SELECT concat_ws(' ', 'type', oid::regtype) FROM pg_type
            WHERE typnamespace::regnamespace::text !~ '^(pg_|information_schema)'
            UNION ALL
            SELECT concat_ws(' ', 'schema', nspname) FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'
            ORDER BY 1""")
            ).scalars()
        )


def test_there_is_one_head() -> None:
    """Two branches would leave it to chance which is applied. All are known without Alembic."""
    scripts = ScriptDirectory.from_config(migrations.config())
    assert scripts.get_heads() == [migrations.head()]
    assert scripts.get_bases() == ["0001"]
    assert all(migrations.known(each.revision) for each in scripts.walk_revisions())
    assert not migrations.known("later")


def test_up_down_and_up_again_comes_to_the_same(empty: Engine) -> None:
    """Down leaves nothing at all behind, of ours or of Procrastinate's."""
    nothing = shape(empty)
    migrations.upgrade(empty)
    everything = shape(empty)
    assert len(everything) > len(nothing) + 200
    migrations.downgrade(empty, "base")
    assert shape(empty) == nothing
    migrations.upgrade(empty)
    assert shape(empty) == everything


def test_every_step_can_be_taken_alone(empty: Engine, later: Callable[..., None]) -> None:
    """Up one by one, and down again: each step back comes to what was there before it. A later release adds one."""
    later("op.add_column('messages', sa.Column('note', sa.Text()))", undoes="op.drop_column('messages', 'note')")
    shapes = [shape(empty)]
    steps = [script.revision for script in ScriptDirectory.from_config(migrations.config()).walk_revisions()][::-1]
    for step in steps:
        migrations.upgrade(empty, step)
        shapes.append(shape(empty))
    for step in [*steps[-2::-1], "base"]:
        shapes.pop()
        migrations.downgrade(empty, step)
        assert shape(empty) == shapes[-1], step


def test_the_tables_and_the_steps_agree(engine: Engine) -> None:
    """What the code queries is what the migrations make: columns, types, nulls, defaults, indexes, constraints."""
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_object": migrations.include_object,
                "target_metadata": metadata,
            },
        )
        assert compare_metadata(context, metadata) == []


def test_the_comparison_finds_what_differs(engine: Engine) -> None:
    """Were it blind, the test above could not fail."""
    with engine.connect() as connection:
        connection.execute(text("ALTER TABLE messages DROP COLUMN facility"))
        connection.execute(text("ALTER TABLE deliveries ALTER COLUMN attempts SET DEFAULT 1"))
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_server_default": True,
                "include_object": migrations.include_object,
                "target_metadata": metadata,
            },
        )
        assert len(compare_metadata(context, metadata)) == 2
        connection.rollback()


def test_where_the_schema_is_and_where_the_code_wants_it(empty: Engine) -> None:
    """`None` before the first step."""
    with empty.connect() as connection:
        assert migrations.current(connection) is None
    migrations.upgrade(empty)
    with empty.connect() as connection:
        assert migrations.current(connection) == migrations.head()


UPGRADE = """
import sys
from receiver.errors import ConfigurationError, Conflict
from receiver.database import compatibility, migrations
from receiver.database.engine import open_engine
print("begun", flush=True)
migrations.upgrade(open_engine(sys.argv[1], pooled=False))
"""


def test_two_upgrades_at_once_do_it_once(empty: Engine, empty_url: str) -> None:
    """Both processes begin while the lock is held; one migrates, the other waits and finds nothing to do."""
    with empty.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(:key)"), {"key": migrations._LOCK})
        children = [
            subprocess.Popen([sys.executable, "-c", UPGRADE, empty_url], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
        gate.execute(text("SELECT pg_advisory_unlock_all()"))
        gate.commit()
        for child in children:
            child.communicate(timeout=120)
    assert [child.returncode for child in children] == [0, 0]
    with empty.connect() as connection:
        assert migrations.current(connection) == migrations.head()
        assert connection.scalar(text("SELECT count(*) FROM registry_version")) == 1


def test_a_step_that_fails_leaves_nothing(empty: Engine) -> None:
    """A step is one transaction: what is in the way at its end takes back its beginning."""
    with empty.begin() as connection:
        connection.execute(text("CREATE SCHEMA procrastinate"))
    before = shape(empty)
    with pytest.raises(Exception, match="DuplicateSchema"):
        migrations.upgrade(empty)
    assert shape(empty) == before


# What a later release may bring, each after the head of today.
LATER = """
import sqlalchemy as sa
from alembic import op
revision = "later"
down_revision = {head!r}
branch_labels, depends_on = None, None
oldest_code = {oldest!r}
def upgrade() -> None:
    {does}
def downgrade() -> None:
    {undoes}
"""


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process the one of a later release, with one revision more."""
    made = tmp_path / "migrations"
    today = migrations.head()

    def make(does: str, oldest: str = today, undoes: str = "pass") -> None:
        shutil.copytree(ROOT / "migrations", made, ignore=shutil.ignore_patterns("__pycache__"))
        (made / "versions" / "later.py").write_text(LATER.format(head=today, oldest=oldest, does=does, undoes=undoes))
        monkeypatch.setattr(migrations, "location", lambda: made)

    return make


def test_a_later_release_says_which_code_runs_on_its_schema(
    engine: Engine, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that only expands keeps the older code at work, which leaves it alone; one that contracts does not."""
    today, of_today = migrations.head(), migrations.location
    with engine.connect() as connection:
        assert compatibility.schema_compatibility(connection).state == "level"
        assert migrations.oldest_code(connection) is not None

    later("op.execute('ALTER TABLE workers ADD COLUMN note text')")
    with engine.connect() as connection:
        assert compatibility.schema_compatibility(connection).state == "behind"
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert compatibility.schema_compatibility(connection).state == "level"

    monkeypatch.setattr(migrations, "location", of_today)
    with engine.begin() as connection:
        found = compatibility.schema_compatibility(connection)
        assert (found.current, found.state, found.compatible) == ("later", "ahead", True)
        assert "install the release" in found.message
    migrations.upgrade(engine)  # nothing to do
    with engine.begin() as connection:
        migrations.mark(connection, "later")
        found = compatibility.schema_compatibility(connection)
        assert (found.wanted, found.state, found.compatible) == (today, "beyond", False)
        assert "install the release" in found.message
    with pytest.raises(ConfigurationError, match="of a newer release"):
        migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("COMMENT ON TABLE alembic_version IS NULL"))
        assert compatibility.schema_compatibility(connection).state == "beyond"


def test_a_step_waits_for_a_lock_and_gets_by(
    engine: Engine, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody holds a table, a step asks for it, lets go, and asks again; those who write get by meanwhile."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(migrations, "PAUSE", 0.1)
    monkeypatch.setattr(migrations, "ATTEMPTS", 1_000)
    later("op.execute('ALTER TABLE messages ADD COLUMN note text')")
    with engine.connect() as holder, engine.connect() as writer, ThreadPoolExecutor(1) as threads:
        holder.execute(text("SELECT count(*) FROM messages"))  # as a backup does, for as long as it takes
        upgrading = threads.submit(migrations.upgrade, engine)
        writer.execute(text("SET lock_timeout = '60s'"))
        for _ in range(20):
            writer.execute(text("LOCK TABLE messages IN ROW EXCLUSIVE MODE"))
            writer.commit()
        assert not upgrading.done()
        holder.rollback()
        upgrading.result(60)
    with engine.connect() as connection:
        assert migrations.current(connection) == "later"


def test_a_step_that_gets_no_lock_gives_up(
    engine: Engine, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says who may hold it; nothing has changed."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(migrations, "PAUSE", 0.0)
    monkeypatch.setattr(migrations, "ATTEMPTS", 2)
    before = migrations.head()
    later("op.execute('ALTER TABLE workers ADD COLUMN a text'); op.execute('ALTER TABLE messages ADD COLUMN b text')")
    with engine.connect() as holder:
        holder.execute(text("LOCK TABLE messages IN ACCESS SHARE MODE"))
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(Conflict, match=rf"a table is locked.*redox-receiver, pid {pid}"):
            migrations.upgrade(engine)
    with engine.connect() as connection:
        assert migrations.current(connection) == before
        assert connection.scalar(text("SELECT count(*) FROM pg_attribute WHERE attname = 'a'")) == 0


def test_an_index_can_be_built_beside_the_feed(engine: Engine, later: Callable[..., None]) -> None:
    """Outside a transaction, one at a time. Of a partitioned table part by part, again after an interruption."""
    later("""from receiver.storage.queue.partitions import TABLES, build_index
    with op.get_context().autocommit_block():
        op.create_index("ix_later", "lanes", ["epoch"], postgresql_concurrently=True, if_not_exists=True)
        build_index(op.get_bind(), "ix_messages_later", TABLES["messages"], "(kind)")""")
    with engine.begin() as connection:
        connection.execute(text("CREATE INDEX ix_messages_later ON ONLY messages (kind)"))
        connection.execute(text("CREATE INDEX ix_messages_later_default ON messages_default (kind)"))
        connection.execute(
            text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_messages_later_default'::regclass")
        )
    migrations.upgrade(engine)
    with engine.connect() as connection:
        for index in ("ix_later", "ix_messages_later", "ix_messages_later_default"):
            assert connection.scalar(text(f"SELECT indisvalid FROM pg_index WHERE indexrelid = '{index}'::regclass"))
        assert "ix_messages_later_default" in connection.scalar(
            text(
                "SELECT string_agg(inhrelid::regclass::text, ' ') FROM pg_inherits "
                "WHERE inhparent = 'ix_messages_later'::regclass"
            )
        )
        assert migrations.current(connection) == "later"


def test_the_installed_procrastinate_is_the_one_that_was_migrated() -> None:
    """A new version of it needs a revision of ours, with the tables and functions that it wants."""
    installed = (files("procrastinate") / "sql" / "schema.sql").read_text()
    assert migrations.procrastinate_sql(version("procrastinate")) == installed


def test_procrastinate_lives_in_a_schema_of_its_own(engine: Engine) -> None:
    """Nothing of it is among our tables, and nothing of ours among its."""
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT relnamespace::regnamespace::text, count(*) FROM pg_class "
                "WHERE relname LIKE 'procrastinate%' AND relkind = 'r' GROUP BY 1"
            )
        ).all()
    assert [row[0] for row in found] == ["procrastinate"]
    assert not [table for table in metadata.tables if table.startswith("procrastinate")]


def test_the_steps_travel_inside_the_package(tmp_path: Path, empty_url: str) -> None:
    """As a wheel lays them out: `receiver/migrations` is found there, and enough to migrate."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "receiver", tmp_path / "receiver", ignore=ignore)
    shutil.copytree(ROOT / "migrations", tmp_path / "receiver" / "migrations", ignore=ignore)
    code = f"{UPGRADE}\nprint(migrations.location())"
    done = subprocess.run(
        [sys.executable, "-c", code, empty_url],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == f"begun\n{tmp_path / 'receiver' / 'migrations'}\n"


def test_in_the_source_tree_the_steps_lie_beside_the_package() -> None:
    """Where people look for them."""
    assert migrations.location() == ROOT / "migrations"


# What PostgreSQL 14 does not know: from the release notes of 15 to 18.
NEWER = re.compile(
    r"\b(MERGE INTO|NULLS NOT DISTINCT|ANY_VALUE|(?-i:JSON_(TABLE|OBJECT|ARRAY|SCALAR|SERIALIZE|EXISTS|VALUE|QUERY))|"
    r"uuidv[47]|RETURNING (OLD|NEW)\b|WITHOUT OVERLAPS|NOT ENFORCED|regexp_(count|instr|substr|like)|"
    r"array_(shuffle|sample|reverse|sort)|IS JSON|VIRTUAL\b)",
    re.IGNORECASE,
)


@pytest.mark.parametrize("folder", ["receiver", "migrations"])
def test_no_statement_needs_more_than_postgresql_14(folder: str) -> None:
    """The oldest that is promised; the tests run on the newest."""
    newer = {
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sql")
        for found in NEWER.finditer(path.read_text())
    }
    assert newer == set()
