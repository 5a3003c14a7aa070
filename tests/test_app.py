"""Whole processes: how they start, and what they do when the database is missing, behind or locked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from sqlalchemy import Engine, make_url, text

from receiver import app, keyring, settings
from receiver.cli import main
from receiver.database import migrations
from receiver.database.engine import open_engine
from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.key_records import record_keys
from tests.support.postgres import drop_database, new_database, open_directory, session_cluster
from tests.support.server import OURS, Answer, Server, post, serving
from tests.support.site import SOURCE, Site, sent
from tests.support.waiting import until

ADMIN = (*OURS, "--workers", "1", "receiver.asgi:admin")


@pytest.fixture
def site(engine: Engine, database_url: str, registration: RegistryChanges, keyring_path: Path, tmp_path: Path) -> Site:
    """A new database with one destination, `lab`."""
    site = Site(
        engine=engine,
        registration=registration,
        directory=tmp_path,
        environment={"DATABASE_URL": database_url, "RECEIVER_DATA_DIR": str(tmp_path), "RECEIVER_RECEIVERS": "1"},
    )
    site.add("lab")
    return site


def administer(statement: str, *names: str) -> None:
    """Run a statement as administrator of the server; {} are names."""
    address = make_url(session_cluster().url)
    with psycopg.connect(
        host=str(address.query["host"]),
        port=str(address.query["port"]),
        user=address.username,
        dbname="postgres",
        autocommit=True,
    ) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@contextmanager
def away(site: Site) -> Iterator[Callable[[], None]]:
    """The site's database is away while the block runs, or until the yielded function is called."""
    name = str(make_url(site.environment["DATABASE_URL"]).database)
    gone = True

    def back() -> None:
        nonlocal gone
        if gone:
            administer("ALTER DATABASE {} RENAME TO {}", f"{name}_away", name)
            administer("ALTER DATABASE {} ALLOW_CONNECTIONS true", name)
            gone = False

    site.engine.dispose()
    administer("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
    disconnect(name)
    administer("ALTER DATABASE {} RENAME TO {}", name, f"{name}_away")
    try:
        yield back
    finally:
        back()


def disconnect(name: str) -> None:
    """End every connection to a database."""
    administer(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'")


def ready(server: Server) -> tuple[int, dict[str, Any]]:
    """The reply of /readyz: its status, and the checks by name."""
    answer = server.ask(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
    found = json.loads(answer.body)
    assert found["ready"] is (answer.status == 200)
    return answer.status, {check["name"]: check for check in found["checks"]}


def unavailable(answer: Answer) -> bool:
    """Whether the reply is the 503 with Retry-After."""
    return answer.status == 503 and answer.headers["retry-after"] == "5" and answer.body == b"try again later\n"


# --- where the database is


def test_database_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_URL takes precedence."""
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p@h/n")
    assert app.database_url(settings.load_settings()) == "postgres://u:p@h/n"


def test_database_url_of_the_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the embedded PostgreSQL is used; if none runs, the error names the command that starts it."""
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(open_directory()))
    with pytest.raises(ConfigurationError, match="redox-receiver up"):
        app.database_url(settings.load_settings())


# --- starting


def refuses_to_start(site: Site, **environment: str) -> str:
    """The output of a receiver that does not start."""
    with serving(site.directory, site.environment | environment, wait=False) as server:
        assert server.process.wait(60) != 0
        return server.text()


def test_other_keys(site: Site, tmp_path: Path) -> None:
    """A host with another keyring than the database's does not start; the error names the setting."""
    keyring.create(datetime.now(UTC)).save(tmp_path / "other.json")
    assert "RECEIVER_KEYRING" in refuses_to_start(site, RECEIVER_KEYRING=str(tmp_path / "other.json"))


def test_no_keyring(site: Site, tmp_path: Path) -> None:
    """A host without a keyring does not start; the error names the command that makes one."""
    assert "redox-receiver keys init" in refuses_to_start(site, RECEIVER_KEYRING=str(tmp_path / "none.json"))


def test_wrong_setting(site: Site) -> None:
    """The error names an invalid setting."""
    assert "RECEIVER_THREADS" in refuses_to_start(site, RECEIVER_THREADS="none")


def test_started_before_the_database(site: Site) -> None:
    """A receiver starts without its database and answers 503, and serves by itself once the database is there."""
    with away(site) as back, serving(site.directory, site.environment) as server:
        assert unavailable(server.ask(sent(site)))
        assert server.lines("request.unavailable")[0]["reason"] == "registry_never_loaded"
        back()
        until(lambda: server.ask(sent(site)).status == 200)


def test_other_keys_found_late(site: Site, tmp_path: Path) -> None:
    """A host that finds after its start that its keys are not the database's answers 503, not 401."""
    keyring.create(datetime.now(UTC)).save(tmp_path / "other.json")
    environment = site.environment | {"RECEIVER_KEYRING": str(tmp_path / "other.json")}
    with away(site) as back, serving(site.directory, environment) as server:
        back()
        until(lambda: server.lines("keys.not_proved"))
        assert unavailable(server.ask(sent(site)))


def test_started_before_the_migrations(keyring: Keyring, tmp_path: Path) -> None:
    """A receiver on an empty database answers 503, and serves by itself once the schema and the keys are there."""
    url = new_database()
    keyring.save(tmp_path / "keyring.json")
    engine = open_engine(url)
    site = Site(
        engine=engine,
        registration=RegistryChanges(engine, keyring, actor="tester@test"),
        directory=tmp_path,
        environment={"DATABASE_URL": url, "RECEIVER_DATA_DIR": str(tmp_path), "RECEIVER_RECEIVERS": "1"},
    )
    site.tokens["lab"] = "x" * 32
    with serving(tmp_path, site.environment) as server:
        assert unavailable(server.ask(sent(site)))
        migrations.upgrade(engine)
        until(lambda: server.lines("keys.not_proved"))
        with engine.begin() as connection:
            record_keys(connection, keyring)
        site.add("lab")
        until(lambda: server.ask(sent(site)).status == 200)
    engine.dispose()
    drop_database(url)


# --- running


def test_a_new_key_is_read_by_running_receivers(site: Site, tmp_path: Path) -> None:
    """A row signed with a new key is verified by running receivers, and the feed continues."""
    with serving(site.directory, site.environment) as server:
        assert server.ask(sent(site)).status == 200
        changed(site, tmp_path / "keyring.json", tmp_path / "keyring.json")
        until(lambda: len(server.lines("registry.loaded")) > 1)
        assert server.lines("registry.loaded")[-1]["version"] == site.rows("SELECT version FROM registry_version")[0][0]
        assert server.ask(sent(site)).status == 200
        assert not server.lines("registry.row_not_proved")


@pytest.mark.parametrize("purpose", ["payload", "secret", "mac", "token", "session"])
def test_a_key_is_rotated_under_load(site: Site, purpose: str) -> None:
    """`keys new`, `keys activate`, `destination set`, while Redox sends: every message is accepted, and recorded."""

    def command(*arguments: str) -> Any:
        done = CliRunner().invoke(main, [*arguments, "--json"], env=site.environment)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def send() -> int:
        count = 0
        while not enough.is_set():
            assert server.ask(sent(site)).status == 200
            count += 1
        return count

    enough = threading.Event()
    with serving(site.directory, site.environment) as server, ThreadPoolExecutor(2) as threads:
        sending = [threads.submit(send) for _ in range(2)]
        try:
            new = command("keys", "new", purpose)["id"]
            until(lambda: site.rows(f"SELECT 1 FROM listeners WHERE stopped_at IS NULL AND '{new}' = ANY(keys)"))
            command("keys", "activate", new)
            command("destination", "set", "lab", "--test-messages", "quarantine")
            if purpose in ("payload", "mac"):
                table = "payloads" if purpose == "payload" else "messages"
                until(lambda: site.rows(f"SELECT 1 FROM {table} WHERE {purpose}_key = '{new}'"))
            version = site.rows("SELECT version FROM registry_version")[0][0]
            until(lambda: [line for line in server.lines("registry.loaded") if line["version"] >= version])
        finally:
            enough.set()
        count = sum(each.result() for each in sending)
        assert site.count("messages") == count
        assert not server.lines("registry.row_not_proved")


def test_a_new_key_that_was_not_copied_here(site: Site, tmp_path: Path) -> None:
    """A host that lacks the key of a row answers 503, not 401, names the key, and serves once it has the file."""
    (tmp_path / "keyring.json").rename(tmp_path / "elsewhere.json")
    keyring.load_keyring(tmp_path / "elsewhere.json").save(tmp_path / "keyring.json")
    with serving(site.directory, site.environment) as server:
        assert server.ask(sent(site)).status == 200
        new = changed(site, tmp_path / "elsewhere.json", tmp_path / "elsewhere.json")
        until(lambda: server.lines("registry.in_doubt"))
        assert new in server.lines("registry.in_doubt")[0]["error"]
        assert unavailable(server.ask(sent(site)))
        keyring.load_keyring(tmp_path / "elsewhere.json").save(tmp_path / "keyring.json")
        until(lambda: server.ask(sent(site)).status == 200)


def changed(site: Site, old: Path, place: Path) -> str:
    """What `keys new mac` and then `destination set` do; the id of the new key."""
    ring = keyring.load_keyring(old).with_new("mac", datetime.now(UTC))
    ring.save(place)
    with site.engine.begin() as connection:
        record_keys(connection, ring)
    RegistryChanges(site.engine, ring, actor="tester@test").set_destination(
        "lab", datetime.now(UTC), {"test_messages": "quarantine"}
    )
    return ring.current("mac").id


def test_locked(site: Site) -> None:
    """A locked table is a 503 in time; the repeat is accepted after the lock."""
    with serving(site.directory, site.environment) as server:
        raw = sent(site)
        with site.engine.begin() as connection:
            connection.execute(text("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"))
            with server.wire(timeout=8) as wire:
                assert unavailable(wire.send(raw).answer())
        until(lambda: server.ask(raw).status == 200)
        assert site.count("messages") == 1


def test_away_and_back(site: Site) -> None:
    """Without its database the receiver answers 503, and no message answered 200 is lost; with it, it serves again."""
    with serving(site.directory, site.environment) as server:
        assert server.ask(sent(site)).status == 200
        with away(site):
            with server.wire(timeout=8) as wire:
                assert unavailable(wire.send(sent(site)).answer())
            assert server.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").status == 200
        raw = sent(site)
        until(lambda: server.ask(raw).status == 200)
        assert site.count("messages") == 2


# --- the admin listener


def test_admin(site: Site) -> None:
    """`/readyz` has each check as JSON; all other paths are 404."""
    with serving(site.directory, site.environment, arguments=ADMIN) as server:
        status, checks = ready(server)
        assert status == 200
        assert list(checks) == ["database", "schema", "keys", "registry", "worker"]
        assert all(check["ok"] for check in checks.values())
        assert "start `redox-receiver worker`" in checks["worker"]["detail"]
        with site.engine.begin() as connection:
            connection.execute(text("INSERT INTO workers (name, host, pid, handlers) VALUES ('w', 'h', 1, '{}')"))
        assert "seen" in ready(server)[1]["worker"]["detail"]
        for start, expected in ((b"GET /redox/lab", 404), (b"GET /", 404), (b"GET /x", 404), (b"POST /readyz", 405)):
            answer = server.ask(start + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert (answer.status, answer.headers["content-type"]) == (expected, "application/json")


def test_metrics(site: Site) -> None:
    """The counters of every receiver process of the host, and the gauges of the database, in Prometheus' format."""
    environment = site.environment | {"RECEIVER_RECEIVERS": "2"}

    def metrics() -> dict[tuple[str, ...], float]:
        answer = admin.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return {
            (sample.name.removeprefix("redox_receiver_"), *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }

    with serving(site.directory, environment) as server, serving(site.directory, environment, arguments=ADMIN) as admin:
        repeated = sent(site)
        for raw in (*[sent(site) for _ in range(20)], repeated, repeated):
            assert server.ask(raw).status == 200
        refused = post("/redox/lab", b"{}", verification_token="wrong")
        assert [server.ask(refused).status for _ in range(3)] == [401] * 3
        assert server.ask(post("/redox/nowhere", b"{}")).status == 401
        found = metrics()
        outcomes = {key: value for key, value in found.items() if key[0] == "requests_total"}
        assert outcomes == {
            ("requests_total", "", "lab", "unhandled"): 21,
            ("requests_total", "", "duplicate", "lab"): 1,
            ("requests_total", "lab", "refused", "token_wrong"): 3,
            ("requests_total", "", "destination_unknown", "refused"): 1,
        }
        assert found[("accept_seconds_count",)] == 22
        assert found[("commit_batch_messages_sum",)] == 22
        assert found[("database_up",)] == 1
        assert found[("feed_probably_paused", "lab")] == 0
        assert found[("findings", "", "no_receiver")] == 0
        assert found[("processes", "receiver", socket.gethostname())] == 2
        seen = found[("source_last_message_timestamp_seconds", SOURCE, "lab")]
        assert abs(seen - found[("feed_last_accepted_timestamp_seconds", "lab")]) < 60

        with away(site):
            found = metrics()
        assert found[("database_up",)] == 0
        assert found[("requests_total", "", "lab", "unhandled")] == 21


def test_not_ready(site: Site, keyring: Keyring) -> None:
    """Read-only, behind, other keys, away: each is a 503 that says how to fix it. A newer schema is not."""
    name = str(make_url(site.environment["DATABASE_URL"]).database)
    with serving(site.directory, site.environment, arguments=ADMIN) as server:
        with site.engine.begin() as connection:
            connection.execute(text("DELETE FROM alembic_version"))
        status, checks = ready(server)
        assert (status, checks["schema"]["ok"]) == (503, False)
        assert "redox-receiver db upgrade" in checks["schema"]["detail"]

        with site.engine.begin() as connection:
            connection.execute(text("INSERT INTO alembic_version (version_num) VALUES ('of_tomorrow')"))
        status, checks = ready(server)
        assert (status, checks["schema"]["ok"]) == (200, True)
        assert "ahead" in checks["schema"]["detail"]

        with site.engine.begin() as connection:
            connection.execute(text("UPDATE keys SET fingerprint = 'other'"))
        status, checks = ready(server)
        assert (status, checks["keys"]["ok"]) == (503, False)
        assert "RECEIVER_KEYRING" in checks["keys"]["detail"]

        administer("ALTER DATABASE {} SET default_transaction_read_only = on", name)
        disconnect(name)
        status, checks = ready(server)
        assert (status, checks["database"]["ok"]) == (503, False)
        administer("ALTER DATABASE {} RESET default_transaction_read_only", name)

        with away(site):
            status, checks = ready(server)
            assert (status, list(checks)) == (503, ["database"])
            assert "DATABASE_URL" in checks["database"]["detail"]


def test_ready_in_time(site: Site) -> None:
    """A database that does not respond is a 503 within seconds, for any number of probes."""
    with serving(site.directory, site.environment, arguments=ADMIN) as server:
        with site.engine.begin() as connection:
            connection.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))
            for _ in range(3):
                with server.wire(timeout=8) as wire:
                    assert wire.send(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").answer().status == 503
        until(lambda: ready(server)[0] == 200)
