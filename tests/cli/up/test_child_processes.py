"""Child processes are restarted, stopped in order, and leave no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from receiver.cli.up import child_processes
from receiver.cli.up.child_processes import Child, ChildSpec, stop
from tests.support.processes import gone
from tests.support.waiting import until

# Starts a FAMILY as `up` does, prints its pid, and waits.
PARENT = """
import sys, time
from receiver import logs
from receiver.cli.up.child_processes import Child, ChildSpec
logs.configure("error")
child = Child(ChildSpec(name="part", command=[sys.executable, "-c", *sys.argv[1:]], timeout=1.0))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""

# A child that starts a grandchild in its group, writes its pid, and reacts to SIGTERM as its argument says.
FAMILY = """
import signal, subprocess, sys, time
from pathlib import Path
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "600"])
Path(sys.argv[2]).write_text(f"{grandchild.pid}\\n")
if sys.argv[1] == "ends":
    sys.exit(3)
time.sleep(600)
"""


@contextmanager
def made(*command: str | Path, timeout: float = 30.0) -> Iterator[Child]:
    """Yield a child with that command, and kill it afterwards."""
    child = Child(ChildSpec(name="part", command=[sys.executable, "-c", *map(str, command)], timeout=timeout))
    try:
        yield child
    finally:
        stop([child], hurried=lambda: True)


def family(what: str, note: Path) -> Sequence[str]:
    """Return the arguments that start a FAMILY."""
    return (FAMILY, what, str(note))


def grandchild(note: Path) -> psutil.Process:
    """Return the grandchild, whose id is in the file."""
    until(lambda: note.exists() and note.read_text().endswith("\n"))
    return psutil.Process(int(note.read_text()))


def test_its_own_session_and_our_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A child has its own session, so that Ctrl-C does not reach it, and its stdout is our stderr."""
    with capture_logs(), made("import os; print('sid', os.getsid(0) == os.getpid())") as child:
        child.start()
        until(lambda: child.ended() is not None)
    written = capfd.readouterr()
    assert "sid True" in written.err
    assert written.out == ""


def test_what_ends_is_started_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends is logged and restarted after a pause, which doubles up to a maximum."""
    monkeypatch.setattr(child_processes, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(child_processes, "LONGEST_PAUSE", 0.05)
    with capture_logs() as logged, made("raise SystemExit(7)") as child:
        child.start()
        ended: list[tuple[object, object]] = []
        while len(ended) < 4:
            child.keep()
            ended = [(line["status"], line["again_in"]) for line in logged if line["event"] == "up.child_ended"]
    assert ended == [(7, 0.02), (7, 0.04), (7, 0.05), (7, 0.05)]


def test_the_pause_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ran long enough is restarted after the shortest pause."""
    monkeypatch.setattr(child_processes, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(child_processes, "STEADY", 0.0)
    with capture_logs() as logged, made("raise SystemExit(7)") as child:
        child.start()
        while len(ended := [line["again_in"] for line in logged if line["event"] == "up.child_ended"]) < 3:
            child.keep()
    assert ended == [0.02, 0.02, 0.02]


def test_what_a_child_leaves_goes(tmp_path: Path) -> None:
    """When a child ends, its own child processes are killed."""
    with made(*family("ends", tmp_path / "note")) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        until(lambda: child.ended() is not None)
        until(lambda: gone(left))


def test_stopped_in_order(tmp_path: Path) -> None:
    """A child that is stopped ends, and its own child processes too."""
    with made(*family("mortal", tmp_path / "note")) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        stop([child], hurried=lambda: False)
        assert child.pid is None
        until(lambda: gone(left))


@pytest.mark.parametrize(("timeout", "hurried"), [(0.0, False), (600.0, True)])
def test_deaf_to_being_told(tmp_path: Path, timeout: float, hurried: bool) -> None:
    """A child that ignores SIGTERM is killed after its timeout, or at once after a second request."""
    with capture_logs() as logged, made(*family("deaf", tmp_path / "note"), timeout=timeout) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        stop([child], hurried=lambda: hurried)
        assert child.pid is None
        until(lambda: gone(left))
    assert "up.child_killed" in [line["event"] for line in logged]


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """If the parent is killed, the kernel sends the child SIGTERM."""
    note = tmp_path / "note"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *family("mortal", note)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    left = grandchild(note)
    parent.kill()
    parent.communicate(timeout=30)
    until(lambda: gone(child))
    left.send_signal(signal.SIGKILL)  # no parent is left to do it: the real parts end their own child processes
