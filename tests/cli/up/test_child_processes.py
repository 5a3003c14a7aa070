"""Children are kept running, stopped in order, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from receiver.cli.up import child_processes
from receiver.cli.up.child_processes import Child, Part, stop

# Starts a FAMILY as `up` does, says its pid, and waits.
PARENT = """
import sys, time
from receiver import logs
from receiver.cli.up.child_processes import Child, Part
logs.configure("error")
child = Child(Part(name="part", command=[sys.executable, "-c", *sys.argv[1:]], timeout=1.0))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""

# A child that leaves a grandchild in its group, says both pids, and does to SIGTERM what its argument says.
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


def until(holds: Callable[[], object]) -> None:
    """Wait for a condition; half a minute of waiting is a failure."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "did not come about within 30 s"
        time.sleep(0.02)


@contextmanager
def made(*command: str | Path, timeout: float = 30.0) -> Iterator[Child]:
    """A child with that command; whatever becomes of it, it is gone at the end."""
    child = Child(Part(name="part", command=[sys.executable, "-c", *map(str, command)], timeout=timeout))
    try:
        yield child
    finally:
        stop([child], hurried=lambda: True)


def family(what: str, note: Path) -> Sequence[str]:
    """The arguments that make a FAMILY."""
    return (FAMILY, what, str(note))


def grandchild(note: Path) -> psutil.Process:
    """The grandchild that wrote itself down."""
    until(lambda: note.exists() and note.read_text().endswith("\n"))
    return psutil.Process(int(note.read_text()))


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; one that only waits to be reaped has."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_its_own_session_and_our_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A Ctrl-C at our terminal does not reach a child, and what it prints does not come on our stdout."""
    with capture_logs(), made("import os; print('sid', os.getsid(0) == os.getpid())") as child:
        child.start()
        until(lambda: child.ended() is not None)
    written = capfd.readouterr()
    assert "sid True" in written.err
    assert written.out == ""


def test_what_ends_is_started_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends is started again after a pause, which doubles up to the longest; each end is logged."""
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
    """One that lived long enough before it ended is started again soon."""
    monkeypatch.setattr(child_processes, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(child_processes, "STEADY", 0.0)
    with capture_logs() as logged, made("raise SystemExit(7)") as child:
        child.start()
        while len(ended := [line["again_in"] for line in logged if line["event"] == "up.child_ended"]) < 3:
            child.keep()
    assert ended == [0.02, 0.02, 0.02]


def test_what_a_child_leaves_goes(tmp_path: Path) -> None:
    """When a child ends by itself, what it has started goes with it."""
    with made(*family("ends", tmp_path / "note")) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        until(lambda: child.ended() is not None)
        until(lambda: gone(left))


def test_stopped_in_order(tmp_path: Path) -> None:
    """A child that is told to end does, and its own children go too."""
    with made(*family("mortal", tmp_path / "note")) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        stop([child], hurried=lambda: False)
        assert child.pid is None
        until(lambda: gone(left))


@pytest.mark.parametrize(("timeout", "hurried"), [(0.0, False), (600.0, True)])
def test_deaf_to_being_told(tmp_path: Path, timeout: float, hurried: bool) -> None:
    """A child that does not end is killed when its timeout ends, or at once when it was said twice."""
    with capture_logs() as logged, made(*family("deaf", tmp_path / "note"), timeout=timeout) as child:
        child.start()
        left = grandchild(tmp_path / "note")
        stop([child], hurried=lambda: hurried)
        assert child.pid is None
        until(lambda: gone(left))
    assert "up.child_killed" in [line["event"] for line in logged]


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """A child whose parent is killed is told to end by the kernel."""
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
    left.send_signal(signal.SIGKILL)  # nobody was left to do it: the real parts look after their own
