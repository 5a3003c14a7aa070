"""`up` runs all parts, restarts them, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from urllib.request import urlopen

import psutil
import pytest

from receiver.simulator.fake_redox import FakeRedox
from tests.support.machine import SOURCE, Machine, machine
from tests.support.postgres import drop_database, new_database
from tests.support.processes import gone
from tests.support.waiting import until


@pytest.fixture
def made() -> Iterator[Machine]:
    """A machine on which nothing runs yet."""
    with machine() as found:
        yield found


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine on which `up` runs, with a worker. Each test leaves it running."""
    with machine() as found:
        found.up("--workers", "1")
        yield found


def send(at: Machine, token: str, seed: int) -> int | None:
    """Send a message, and return the status."""
    redox = FakeRedox(at.url, "lab", token, source_id=SOURCE)
    return redox.send(redox.body("PatientAdmin.Arrival", seed=seed)).status


def live(at: Machine) -> bool:
    """Return whether the public listener answers."""
    with urlopen(f"{at.url}/livez", timeout=30) as answer:
        return bool(answer.status == 200)


def test_first_and_last(made: Machine) -> None:
    """The first `up` creates database and keyring, and prints only its `ready` line. SIGTERM ends it with exit status
    0. The second `up` finds the stored messages."""
    made.up("--workers", "1")
    assert (made.data_dir / "keyring.json").stat().st_mode & 0o777 == 0o600
    token = made.register("lab").read_text().strip()
    until(lambda: send(made, token, 1) == 200)  # every receiver follows the registry within a second
    keyring = (made.data_dir / "keyring.json").read_bytes()
    family = made.family()
    assert len(family) >= 5

    assert made.process is not None
    made.process.terminate()
    assert made.ended() == (0, "")
    assert [process for process in family if not gone(process)] == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(made.url.rpartition(":")[2])))

    made.up("--workers", "0")
    assert (made.data_dir / "keyring.json").read_bytes() == keyring
    until(lambda: send(made, token, 2) == 200)
    assert [each["kind"] for each in made.json("messages", "list")] == ["PatientAdmin.Arrival"] * 2
    # Ctrl-C: the terminal signals the whole process group, which has only `up` in it.
    os.killpg(made.process.pid, signal.SIGINT)
    assert made.ended() == (0, "")
    events = [line["event"] for line in made.lines()]
    assert events.count("up.keyring_made") == 1
    assert "up.child_ended" not in events
    assert events[-1] == "up.stopped"


@pytest.mark.parametrize("part", ["receiver", "admin", "worker-1"])
def test_a_part_that_dies_is_started_again(running: Machine, part: str) -> None:
    """A killed part is restarted. Meanwhile connections wait and are not refused."""
    killed = running.part(part)
    family = psutil.Process(killed).children(recursive=True)
    os.kill(killed, signal.SIGKILL)

    def ended() -> list[int]:
        return [
            line["status"] for line in running.lines() if line["event"] == "up.child_ended" and line["part"] == part
        ]

    until(ended)
    assert live(running)
    until(lambda: running.part(part) != killed)
    until(lambda: all(map(gone, family)))
    assert ended() == [-signal.SIGKILL]


def test_the_database_is_started_again(running: Machine) -> None:
    """A killed postmaster is restarted, and messages are recorded again."""
    token = running.register("lab").read_text().strip()
    killed = running.cluster.pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    until(lambda: running.cluster.pid() not in (None, killed))
    until(lambda: send(running, token, 3) == 200)


def test_it_says_what_comes_next(made: Machine) -> None:
    """Without a destination, the last log line of the start names the command that adds one."""
    made.up("--workers", "0")
    *_, last = until(
        lambda: [
            line for line in made.lines() if line["event"].startswith("up.") and line["event"] == "up.no_destination"
        ]
    )
    assert "redox-receiver destination add NAME --data-dir" in last["error"]
    made.register("lab")
    assert made.process is not None
    made.process.terminate()
    made.ended()
    before = len(made.lines())
    made.up("--workers", "0")
    made.process.terminate()
    made.ended()
    assert "up.no_destination" not in [line["event"] for line in made.lines()[before:]]


def test_a_sighup_tells_what_it_did_not_take(made: Machine) -> None:
    """SIGHUP logs unknown variables, with the probable name, and settings that need a restart."""
    made.data_dir.mkdir(mode=0o700)
    file = made.data_dir / ".env"
    file.write_text("RECEIVER_WORKERS=0\n")
    file.chmod(0o600)
    made.up(no_terminal=True)
    file.write_text("RECEIVER_WORKERS=2\nRECEIVER_TREADS=8\n")
    assert made.process is not None
    made.process.send_signal(signal.SIGHUP)

    def message(event: str) -> str:
        lines = until(lambda: [line for line in made.lines() if line["event"] == event])
        return str(lines[-1]["error"])

    assert "RECEIVER_TREADS (RECEIVER_THREADS?)" in message("settings.unread")
    assert message("up.restart_needed").startswith("RECEIVER_WORKERS changed: restart `up`")
    assert live(made)


def test_a_second_up_is_refused(running: Machine) -> None:
    """A second `up` on the same data directory fails and names the first's process id. The first goes on."""
    assert running.process is not None
    message = running.run("up", "--bind", "127.0.0.1:0", "--admin-bind", "127.0.0.1:0", fails=True)
    assert f"another `redox-receiver up` runs on this data directory (pid {running.process.pid})" in message
    assert live(running)


def test_killed_and_adopted(made: Machine) -> None:
    """If `up` is killed, its parts end. The next `up` adopts the database and gets the port."""
    made.up("--workers", "1")
    postmaster = made.cluster.pid()
    family = [process for process in made.family() if process.pid != postmaster]
    assert made.process is not None
    made.process.kill()
    made.ended()
    made.up("--workers", "0", bind=made.url.removeprefix("http://"))
    assert made.cluster.pid() == postmaster
    until(lambda: all(map(gone, family)))
    assert live(made)


def test_told_twice(made: Machine) -> None:
    """A frozen part delays the stop. After a second signal `up` kills it, and ends normally."""
    made.up("--workers", "1")
    family = made.family()
    psutil.Process(made.part("worker-1")).suspend()
    assert made.process is not None
    made.process.terminate()
    until(lambda: "up.stopping" in [line["event"] for line in made.lines()])
    until(lambda: not psutil.pid_exists(made.part("receiver")))
    made.process.terminate()
    assert made.ended() == (0, "")
    assert [process for process in family if not gone(process)] == []
    assert "up.child_killed" in [line["event"] for line in made.lines()]


def test_a_port_in_use(made: Machine) -> None:
    """A port in use is an error that names the option, before anything is created."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for options in (
            ("--bind", f"127.0.0.1:{port}", "--admin-bind", "127.0.0.1:0"),
            ("--bind", "127.0.0.1:0", "--admin-bind", f"127.0.0.1:{port}"),
        ):
            made.start(*options)
            assert made.ended() == (1, "")
            which = "--bind" if options[1].endswith(str(port)) else "--admin-bind"
            assert (
                f"cannot listen at 127.0.0.1:{port} (Address already in use): choose another with {which} or "
                in made.log.read_text()
            )
    assert not made.data_dir.exists()


def test_a_lost_keyring_is_not_replaced(made: Machine) -> None:
    """If the keyring of an existing database is missing, `up` fails without creating one, and frees its ports."""
    made.up("--workers", "0")
    assert made.process is not None
    made.process.terminate()
    made.ended()
    (made.data_dir / "keyring.json").rename(made.root / "elsewhere.json")
    made.start("--bind", "127.0.0.1:0", "--admin-bind", "127.0.0.1:0")
    assert made.ended() == (1, "")
    assert f"there is no keyring at {made.data_dir / 'keyring.json'}" in made.log.read_text()


def test_nothing_is_made_beside_a_database_of_the_operators(made: Machine) -> None:
    """With DATABASE_URL, `up` creates neither keyring nor tables. It names the commands that do."""
    url = new_database()
    try:
        made.environment["DATABASE_URL"] = url
        made.start()
        assert made.ended() == (1, "")
        assert "redox-receiver keys init" in made.log.read_text()
        assert not made.data_dir.exists()
    finally:
        drop_database(url)


def test_plugins_that_cannot_be_loaded(made: Machine) -> None:
    """A plugin that cannot be imported prevents neither start nor reload. `status` names the error, and the handlers
    of other plugins run."""
    (made.root / "untidy.py").write_text("def broken(:\n")
    made.plug_in("tidy", "from receiver.handlers import handler\n@handler('*', name='tidy')\ndef tidy(m, c): ...\n")
    made.environment["RECEIVER_HANDLERS"] = "untidy,tidy,no.such.plugin"
    made.up("--workers", "1")
    made.register("lab", "--environment", "development")
    until(lambda: made.findings().get("plugin_not_loaded"))
    printed = made.status()
    assert "module no.such.plugin of RECEIVER_HANDLERS cannot be imported: ModuleNotFoundError" in printed
    assert f"({made.root / 'untidy.py'}:1)" in printed

    def working() -> set[int]:
        return {each["pid"] for each in made.known_workers() if each["alive"] and "tidy" in each["handlers"]}

    before = until(working)
    assert made.process is not None
    made.process.send_signal(signal.SIGHUP)
    until(lambda: working() and not working() & before)


def test_modules_that_lie_about_are_not_imported(made: Machine) -> None:
    """Nothing is imported from the directory in which `up` was started: other users may write there."""
    for name in ("structlog", "gunicorn", "sitecustomize"):
        (made.root / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(made.root)!r}, 'bitten').touch()\n")
    made.up("--workers", "0")
    assert not (made.root / "bitten").exists()


def test_a_log_line_is_json(running: Machine) -> None:
    """Every line on stderr is JSON, whichever process wrote it."""
    for line in running.log.read_text().splitlines():
        assert isinstance(json.loads(line), dict)
    assert psutil.pid_exists(running.part("receiver"))
