"""Handler processes that hang, crash, exhaust memory or leave processes behind: real ones, really killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from receiver.errors import ConfigurationError
from receiver.worker.handler_process import child
from receiver.worker.handler_process.bootstrap import init_message
from receiver.worker.handler_process.child import HandlerProcess, HandlerProcessGone
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerSlot
from tests.support.processes import gone
from tests.support.waiting import until
from tests.worker.world import World

MEMORY = 256 * 1024 * 1024


@pytest.fixture(scope="module")
def warm(shared: World) -> Iterator[HandlerSlot]:
    """A slot whose handler processes have little memory."""
    slot = HandlerSlot(lambda: init_message(shared.settings(handler_memory=MEMORY), shared.url))
    yield slot
    slot.close()


@pytest.mark.parametrize(
    ("deed", "outcome", "error_class"),
    [
        ("loop", "timed_out", "TimedOut"),
        ("sleep", "timed_out", "TimedOut"),
        ("query_sleep", "timed_out", "TimedOut"),
        ("exit", "crashed", "Exit3"),
        ("segfault", "crashed", "SIGSEGV"),
        ("close_fds", "timed_out", "TimedOut"),
        ("system_exit", "failed", "SystemExit"),
        ("memory", "failed", "MemoryError"),
    ],
)
def test_a_handler_that_never_returns(
    shared: World, warm: HandlerSlot, place: str, deed: str, outcome: str, error_class: str
) -> None:
    """A handler that loops, sleeps, crashes, exits or exhausts memory ends within five seconds after its timeout.

    The attempt counts, no process is left, and the next delivery runs.
    """
    shared.enable("brief", place)
    sent = shared.hand(deed, "nothing", destination=place)
    warm.warm()
    began = time.monotonic()
    left = shared.stay(warm, sent.lane)
    took = time.monotonic() - began

    assert left == LaneDone(why="dead", error_class=error_class, must_recycle=deed == "memory")
    assert took < 1 + 5
    assert sent.outcomes() == [outcome]
    assert sent.deliveries()[0]["error_class"] == error_class
    pid = sent.journal("begin")[0]["pid"]
    if deed != "system_exit":
        assert gone(pid)
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.states() == ["dead", "succeeded"]
    assert shared.rows("SELECT owner, lease_until FROM lanes WHERE lane = :lane", lane=sent.lane) == [
        {"owner": None, "lease_until": None}
    ]


def test_what_a_handler_has_started_ends_with_it(shared: World, warm: HandlerSlot, place: str) -> None:
    """A process that a handler has forked is killed with it."""
    shared.enable("brief", place)
    sent = shared.hand("fork", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="TimedOut")
    [forked] = sent.journal("forked")
    until(lambda: gone(forked["child"]), "the forked process has ended")
    assert gone(forked["pid"])


def test_a_handler_that_comes_back_twice(shared: World, warm: HandlerSlot, place: str) -> None:
    """If a handler forks and returns in both processes, one continues, and the delivery is recorded once."""
    shared.enable("brief", place)
    sent = shared.hand("fork_return", "nothing", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.outcomes() == ["succeeded", "succeeded"]
    assert len(sent.journal("end")) == 3  # the forked one has written its own end too
    warm.close()
    forked = max(line["child"] for line in sent.journal("forked"))
    until(lambda: gone(forked), "the forked process has ended")


def test_a_failed_attempt_is_tried_again(shared: World, warm: HandlerSlot, place: str) -> None:
    """A killed handler is retried like one that raises: its lane waits, then it runs again."""
    shared.enable("scripted", place)
    sent = shared.hand("exit", "nothing", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="waiting")
    shared.hold_time()
    assert shared.stay(warm, sent.lane) is None
    shared.let_time_pass()
    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="Exit3")
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert (sent.outcomes(), sent.ran()) == (["crashed", "crashed", "succeeded"], [1, 1, 2])


def test_a_process_is_used_again(shared: World, warm: HandlerSlot, place: str) -> None:
    """One process runs lane after lane, also after a handler has raised."""
    shared.enable("fragile", place)
    sent = shared.hand("nothing", "raise", "nothing", destination=place)
    other = shared.hand("nothing", destination=place, source="s2")
    for lane in (sent.lane, sent.lane, other.lane):
        shared.stay(warm, lane)

    assert len({line["pid"] for line in sent.journal() + other.journal()}) == 1


def test_killed_from_outside(shared: World, warm: HandlerSlot, place: str) -> None:
    """A handler process that is killed while it is idle is replaced, and nothing is lost."""
    shared.enable("brief", place)
    pid = warm.warm().pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it is dead")
    sent = shared.hand("nothing", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")


def test_own_session(shared: World, warm: HandlerSlot) -> None:
    """A handler process leads its own session, writes nowhere and dumps no core."""
    pid = warm.warm().pid

    assert os.getsid(pid) == os.getpgid(pid) == pid
    for descriptor in range(3):
        assert Path(f"/proc/{pid}/fd/{descriptor}").readlink() == Path(os.devnull)
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_DATA) == (MEMORY, MEMORY)


def test_a_handler_that_is_not_here(shared: World, warm: HandlerSlot, place: str) -> None:
    """A handler that the process cannot load is a configuration error: no attempt is counted, and the lane is
    released.
    """
    shared.enable("brief", place)
    sent = shared.hand("nothing", destination=place)
    slot = HandlerSlot(lambda: init_message(shared.settings(handlers=()), shared.url))
    try:
        with pytest.raises(ConfigurationError, match="handler brief is not installed on this host"):
            shared.stay(slot, sent.lane)
    finally:
        slot.close()

    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0)]
    assert shared.rows("SELECT owner FROM lanes WHERE lane = :lane", lane=sent.lane) == [{"owner": None}]


def test_a_process_that_does_not_start(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler process without a keyring reports it; one that is not ready in time is given up."""
    slot = HandlerSlot(lambda: init_message(shared.settings(keyring=shared.directory / "nothing.json"), shared.url))
    with pytest.raises(ConfigurationError, match="there is no keyring"):
        slot.warm()

    monkeypatch.setattr(child, "START_TIMEOUT", 0.0)
    process = HandlerProcess(init_message(shared.settings(), shared.url))
    try:
        with pytest.raises(HandlerProcessGone, match="did not start"):
            process.start()
    finally:
        process.kill()
    assert gone(process.pid)
