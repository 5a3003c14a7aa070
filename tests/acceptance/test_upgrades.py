"""An upgrade while the feed runs: first the database, then one host after another.

The later release is a copy of this one with one more revision.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from receiver.database import migrations
from receiver.keyring import Keyring
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import FeedSimulator
from receiver.storage.registry.changes import RegistryChanges
from tests.faults import steady
from tests.support.ports import free_port
from tests.support.site import SOURCE, Site
from tests.support.waiting import until
from tests.test_migrations import LATER, ROOT


class Release:
    """One release of the program, and its processes on one host."""

    def __init__(self, tree: Path, name: str, environment: dict[str, str]) -> None:
        self.log = tree.parent / f"{name}.log"
        self.port, self.admin_port = free_port(), free_port()
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RECEIVER_", "PG")) and name != "DATABASE_URL"
        }
        self._environment = kept | environment | {"PYTHONPATH": os.pathsep.join((str(tree), str(ROOT)))}

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a command, which must succeed unless `check` is False. Returns its output."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "receiver", *arguments],
            env=self._environment,
            check=check,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    def start(self, *parts: str) -> None:
        """Start these parts: `serve`, `admin`, `worker`."""
        options = {
            "serve": ("--bind", f"127.0.0.1:{self.port}"),
            "worker": (),
            "admin": ("--admin-bind", f"127.0.0.1:{self.admin_port}"),
        }
        for part in parts:
            with self.log.open("ab") as log:
                self.parts[part] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "receiver", part, *options[part]],
                    env=self._environment,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of that event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def ready(self) -> tuple[int | None, str]:
        """Return the status of /readyz, and its detail about the schema."""
        status, body = ask(self.admin_port, "/readyz")
        checks = {each["name"]: each["detail"] for each in json.loads(body)["checks"]} if body else {}
        return status, checks.get("schema", "")

    def redox(self, token: str) -> FakeRedox:
        """Return Redox as it sends to this host."""
        return FakeRedox(f"http://127.0.0.1:{self.port}", "lab", token, source_id=SOURCE)

    def clear(self) -> None:
        """End what still runs."""
        for part in self.parts.values():
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
            part.wait(60)


def ask(port: int, path: str) -> tuple[int | None, bytes]:
    """Return status and body. The status is None while nothing listens."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, HTTPException):
        return None, b""
    finally:
        connection.close()


@pytest.fixture
def site(
    engine: Engine,
    database_url: str,
    registration: RegistryChanges,
    keyring: Keyring,
    keyring_path: Path,
    tmp_path: Path,
) -> Site:
    """A database of the current release, with one destination."""
    made = Site(
        engine=engine,
        registration=registration,
        directory=tmp_path,
        environment={
            "DATABASE_URL": database_url,
            "RECEIVER_KEYRING": str(keyring_path),
            "RECEIVER_DATA_DIR": str(tmp_path),
            "RECEIVER_RECEIVERS": "1",
            "RECEIVER_CONCURRENCY": "1",
            "RECEIVER_LEASE": "5",
            "RECEIVER_HANDLERS": steady.__name__,
        },
    )
    made.add("lab")
    with engine.begin() as connection:
        connection.execute(text(steady.TABLE))
    return made


@pytest.fixture
def today(site: Site, tmp_path: Path) -> Iterator[Release]:
    """The current release."""
    made = Release(ROOT, "today", site.environment)
    made.log = tmp_path / "today.log"
    yield made
    made.clear()


@pytest.fixture
def tomorrow(site: Site, tmp_path: Path) -> Iterator[Release]:
    """The next release, which adds to the schema."""
    tree = tmp_path / "tomorrow"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "receiver", tree / "receiver", ignore=without)
    shutil.copytree(ROOT / "migrations", tree / "migrations", ignore=without)
    head = migrations.head()
    (tree / "migrations" / "versions" / "later.py").write_text(
        LATER.format(
            head=head,
            oldest=head,
            undoes="pass",
            does=(
                "op.execute('ALTER TABLE messages ADD COLUMN later text'); op.execute('CREATE TABLE later (id bigint)')"
            ),
        )
    )
    made = Release(tree, "tomorrow", site.environment)
    yield made
    made.clear()


class Sending:
    """A feed that sends messages one after another until `stop`."""

    def __init__(self, redox: FakeRedox, name: str, seeds: int) -> None:
        self.ledger = AttemptLog()
        self._feed = FeedSimulator(redox, name=name, time_scale=0.01, ledger=self.ledger)
        self._redox, self._seeds = redox, seeds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        with self._feed:
            seed = self._seeds
            while not self._over.wait(0.02):
                self._feed.deliver(self._redox.body(("PatientAdmin.Transfer", "Results.New")[seed % 2], seed=seed))
                seed += 1

    def accepted(self) -> int:
        """Return how many messages were answered 200."""
        return sum(each.accepted for each in self.ledger.attempts)

    def more(self) -> None:
        """Wait until ten more were answered 200."""
        before = self.accepted()
        until(lambda: self.accepted() >= before + 10)

    def stop(self) -> None:
        """Stop sending."""
        self._over.set()
        self._feed.stop()
        self._thread.join(60)


def test_the_program_before_the_database(site: Site, tomorrow: Release) -> None:
    """Before its schema is migrated, the next release accepts and delivers nothing, and names the command. After the
    migration it works without a restart."""
    redox = tomorrow.redox(site.tokens["lab"])
    tomorrow.start("serve", "admin", "worker")
    until(lambda: ask(tomorrow.port, "/livez")[0] == 200)
    until(lambda: tomorrow.ready()[0] == 503)
    assert "behind later: run `redox-receiver db upgrade`" in tomorrow.ready()[1]
    assert redox.send(redox.body("PatientAdmin.Transfer")).status == 503
    until(lambda: len(tomorrow.lines("schema.does_not_fit")) == 2)  # the receiver's and the worker's
    assert all("redox-receiver db upgrade" in line["error"] for line in tomorrow.lines("schema.does_not_fit"))
    assert site.count("messages") == 0
    assert site.count("workers") == 0

    assert "to later" in tomorrow.run("db", "upgrade")
    until(lambda: redox.send(redox.body("PatientAdmin.Transfer")).status == 200)
    until(lambda: tomorrow.ready()[0] == 200)
    until(lambda: site.rows("SELECT 1 FROM workers WHERE 'book' = ANY(handlers)"))
    # A receiver follows the worker's binding within a second; what it accepts before that is unhandled.
    seeds = count(2)

    def delivered() -> bool:
        assert redox.send(redox.body("PatientAdmin.Transfer", seed=next(seeds))).status == 200
        return bool(site.rows("SELECT 1 FROM deliveries WHERE state = 'succeeded'"))

    until(delivered)
    assert all(part.poll() is None for part in tomorrow.parts.values())


def test_one_host_after_another(site: Site, today: Release, tomorrow: Release) -> None:
    """Under load the database is upgraded, both releases work at once, and the old one is stopped. Each message
    that was answered 200 is recorded and handled once. Only the process that was stopping refused any."""
    token = site.tokens["lab"]
    today.start("serve", "admin", "worker")
    until(lambda: ask(today.port, "/livez")[0] == 200)
    until(lambda: site.rows("SELECT 1 FROM subscriptions WHERE handler = 'book'"))
    old = Sending(today.redox(token), "old", 1_000)
    old.more()
    assert "to later" in tomorrow.run("db", "upgrade")
    old.more()
    until(lambda: today.lines("schema.ahead"))
    status, schema = today.ready()
    assert (status, "which still runs on it" in schema) == (200, True)
    assert "WARN" in today_check(today)

    tomorrow.start("serve", "worker")
    until(lambda: ask(tomorrow.port, "/livez")[0] == 200)
    new = Sending(tomorrow.redox(token), "new", 500_000)
    new.more()
    old.more()
    until(lambda: len(site.rows("SELECT DISTINCT worker FROM delivery_attempts")) == 2)
    assert {each.status for each in old.ledger.attempts} == {200}

    today.parts["serve"].terminate()
    today.parts["worker"].terminate()
    assert today.parts["serve"].wait(60) == 0
    assert today.parts["worker"].wait(60) == 0
    old.stop()
    new.more()
    new.stop()
    assert {each.status for each in new.ledger.attempts} == {200}
    assert {each.status for each in old.ledger.attempts} <= {200, 503, None}
    until(lambda: not site.rows("SELECT 1 FROM deliveries WHERE state = 'pending'"))
    recorded = [row.log_id for row in site.rows("SELECT log_id FROM messages")]
    answered = {each.message for sending in (old, new) for each in sending.ledger.attempts if each.accepted}
    assert answered <= set(recorded)
    assert len(recorded) == len(set(recorded))
    assert (
        site.count("booked")
        == len(site.rows("SELECT DISTINCT key FROM booked"))
        == site.count("deliveries WHERE handler = 'book' AND state = 'succeeded'")
    )
    beyond(site, today)


def today_check(today: Release) -> str:
    """Return the result of `check` for the schema. Another result is bad: the tests' database is not durable."""
    return next(line for line in today.run("db", "check", check=False).splitlines() if "migrations" in line)


def beyond(site: Site, today: Release) -> None:
    """On an incompatible schema the current release accepts nothing and its worker ends, both while running and after a
    start."""
    redox = today.redox(site.tokens["lab"])
    today.start("serve", "worker")
    until(lambda: redox.send(redox.body("PatientAdmin.Transfer", seed=7)).status == 200)
    until(lambda: len(today.lines("worker.started")) == 2)
    with site.engine.begin() as connection:
        migrations.mark(connection, "later")
    until(lambda: redox.send(redox.body("PatientAdmin.Transfer", seed=8)).status == 503)
    assert today.ready()[0] == 503
    assert "too far ahead" in today.ready()[1]
    assert today.parts["worker"].wait(60) == 0
    assert "install the release that moved it" in today.lines("schema.does_not_fit")[-1]["error"]
