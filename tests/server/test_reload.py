"""SIGHUP: the old workers serve until new ones do, and keep serving if the new configuration is not valid."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from receiver import keyring as keyrings
from receiver.keyring import Keyring
from tests.support.server import Server, serving
from tests.support.site import Site, sent
from tests.support.waiting import until

GOOD = "RECEIVER_THREADS=4\nRECEIVER_RECEIVERS=1\n"


@pytest.fixture(scope="module")
def env_file(site: Site) -> Path:
    """The .env file."""
    made = site.directory / "settings.env"
    made.write_text(GOOD)
    return made


@pytest.fixture(scope="module")
def server(site: Site, env_file: Path) -> Iterator[Server]:
    """A receiver with the settings of that file."""
    environment = {name: value for name, value in site.environment.items() if name != "RECEIVER_RECEIVERS"}
    with serving(site.directory, environment | {"RECEIVER_ENV_FILE": str(env_file)}) as server:
        yield server


def pids(server: Server) -> set[int]:
    """Its workers."""
    return {each.pid for each in server.workers()}


def started(server: Server) -> set[int]:
    """Its workers, once each of them has started: until then a worker may still read what a test writes."""
    until(lambda: all(_threads(each) > 4 for each in server.workers()))
    return pids(server)


def _threads(process: psutil.Process) -> int:
    try:
        return int(process.num_threads())
    except psutil.NoSuchProcess:
        return 0


def reloaded(server: Server, event: str) -> str:
    """Send SIGHUP; return the error of the log line that follows."""
    before = len(server.lines(event))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(server.lines(event)) > before)
    return str(server.lines(event)[-1].get("error"))


@contextmanager
def asked_all_the_while(site: Site, server: Server) -> Iterator[list[int]]:
    """Send messages one after another while the block runs; yields their statuses."""
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.append(server.ask(sent(site)).status)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield statuses
    finally:
        over.set()
        asking.join(60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"RECEIVER_THREADS=many\nRECEIVER_LEASE=none\n", "RECEIVER_THREADS"),
        (b"RECEIVER_THREADS=\xff", "not UTF-8 text"),
        (None, "there is no file"),
    ],
)
def test_settings_that_do_not_hold(
    site: Site, server: Server, env_file: Path, text: bytes | None, expected: str
) -> None:
    """One line says what is wrong, and the same workers keep serving."""
    before = pids(server)
    try:
        if text is None:
            env_file.unlink()
        else:
            env_file.write_bytes(text)
        assert expected in reloaded(server, "receiver.not_reloaded")
    finally:
        env_file.write_text(GOOD)
    assert pids(server) == before
    assert server.ask(sent(site)).status == 200


def test_a_missing_keyring(site: Site, server: Server) -> None:
    """A missing keyring is found before any worker is stopped."""
    before, path = pids(server), site.directory / "keyring.json"
    path.rename(site.directory / "elsewhere.json")
    try:
        assert "redox-receiver keys init" in reloaded(server, "receiver.not_reloaded")
    finally:
        (site.directory / "elsewhere.json").rename(path)
    assert pids(server) == before
    assert server.ask(sent(site)).status == 200


@pytest.mark.parametrize("server_mode", ["flask", "asgi"])
def test_workers_that_do_not_boot(
    site: Site, server: Server, env_file: Path, keyring: Keyring, server_mode: str
) -> None:
    """A mistake that only a worker finds ends that worker alone; later workers have the old settings."""
    before, refusals = started(server), len(server.lines("receiver.not_started"))
    keyrings.create(datetime.now(UTC)).save(site.directory / "keyring.json")
    env_file.write_text(f"{GOOD}RECEIVER_SERVER_MODE={server_mode}\n")
    try:
        with asked_all_the_while(site, server) as statuses:
            assert "the old workers continue" in reloaded(server, "receiver.not_reloaded")
    finally:
        keyring.save(site.directory / "keyring.json")
        env_file.write_text(GOOD)
    until(lambda: pids(server) == before)
    assert set(statuses) == {200}
    [line] = server.lines("receiver.not_started")[refusals:]
    assert "RECEIVER_KEYRING" in line["error"]
    server.workers()[0].kill()
    until(lambda: len(pids(server) - before) == 1)
    assert server.ask(sent(site)).status == 200


@pytest.mark.parametrize("server_mode", ["flask", "asgi"])
def test_a_database_that_is_slow(site: Site, server: Server, env_file: Path, server_mode: str) -> None:
    """New workers take over once they have compared their keys with the database's: no message is refused."""
    before, reloads = pids(server), len(server.lines("receiver.reloaded"))
    waits = len(server.lines("keys.not_compared"))
    env_file.write_text(f"{GOOD}RECEIVER_SERVER_MODE={server_mode}\n")
    try:
        with asked_all_the_while(site, server) as statuses:
            with site.engine.connect() as connection, connection.begin():
                connection.execute(text("LOCK TABLE keys IN ACCESS EXCLUSIVE MODE"))
                server.process.send_signal(signal.SIGHUP)
                until(lambda: len(server.lines("keys.not_compared")) > waits)
                asked = len(statuses)
                until(lambda: len(statuses) > asked + 20)
                assert before <= pids(server)
            until(lambda: len(server.lines("receiver.reloaded")) > reloads)
    finally:
        env_file.write_text(GOOD)
    assert set(statuses) == {200}
    assert not pids(server) & before
    assert server.ask(sent(site)).status == 200


@pytest.mark.parametrize("server_mode", ["flask", "asgi"])
def test_settings_that_hold(site: Site, server: Server, env_file: Path, server_mode: str) -> None:
    """New settings take effect, including the number of workers, and no request is refused meanwhile."""
    before = pids(server)
    env_file.write_text(f"RECEIVER_THREADS=6\nRECEIVER_RECEIVERS=2\nRECEIVER_SERVER_MODE={server_mode}\n")
    try:
        with asked_all_the_while(site, server) as statuses:
            reloaded(server, "receiver.reloaded")
    finally:
        env_file.write_text(GOOD)
    assert len(pids(server)) == 2
    assert not pids(server) & before
    assert set(statuses) == {200}
    assert server.ask(sent(site)).status == 200
    assert server.process.poll() is None


def test_a_worker_that_cannot_start_again(site: Site, keyring: Keyring) -> None:
    """A worker that died cannot start again: the others keep serving, and gunicorn tries until it can."""
    with serving(site.directory, site.environment | {"RECEIVER_RECEIVERS": "2"}) as server:
        before = started(server)
        keyrings.create(datetime.now(UTC)).save(site.directory / "keyring.json")
        try:
            server.workers()[0].kill()
            until(lambda: len(pids(server) & before) == 1)
            with asked_all_the_while(site, server) as statuses:
                until(lambda: len(server.lines("receiver.not_started")) >= 2)
        finally:
            keyring.save(site.directory / "keyring.json")
        assert set(statuses) == {200}
        until(lambda: len(started(server)) == 2 and server.process.poll() is None)
        assert len(pids(server) & before) == 1
        assert server.ask(sent(site)).status == 200
