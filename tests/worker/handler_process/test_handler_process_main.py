"""The handler process, driven over its control channel as its parent does."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from receiver.errors import ConfigurationError
from receiver.retry_policy import RetryPolicy
from receiver.storage.queue import leases
from receiver.worker.handler_process.bootstrap import init_message
from receiver.worker.handler_process.child import HandlerProcess
from receiver.worker.handler_process.ipc import (
    CannotExecute,
    Ended,
    LaneDone,
    LeaseUntil,
    LeaveLane,
    Ready,
    RunLanes,
    Started,
)
from tests.support.processes import gone
from tests.support.waiting import until
from tests.worker.world import PLUGIN, Sent, World


@pytest.fixture
def process(shared: World) -> Iterator[HandlerProcess]:
    """A handler process that is ready."""
    process = HandlerProcess(init_message(shared.settings(), shared.url))
    process.start()
    yield process
    process.kill()


def run(world: World, process: HandlerProcess, sent: Sent, *, lease: float = 60.0, **more: Any) -> None:
    """Command a run of the lane, under a lease that is long in the database."""
    with world.engine.connect() as connection:
        fence = leases.claim(connection.execution_options(isolation_level="AUTOCOMMIT"), sent.lane, "tester", 600)
    assert fence is not None
    handler, destination, _ = sent.lane.split("/", 2)
    now = time.monotonic()
    process.command(
        RunLanes(
            lanes=((sent.lane, fence.epoch),),
            owner="tester",
            handler=handler,
            destination=destination,
            timeout=600,
            policy=RetryPolicy(max_attempts=2, on_failure="dead"),
            until=now + lease,
            leave_at=now + 60,
            **more,
        )
    )


def hear(process: HandlerProcess, seconds: float = 60.0) -> Any:
    """Return the next message of the process."""
    return process.receive(time.monotonic() + seconds)


def unread(process: HandlerProcess) -> int:
    """Return the number of bytes that the process has not read."""
    return int.from_bytes(fcntl.ioctl(process._channel.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_messages_of_a_run(shared: World, process: HandlerProcess, place: str) -> None:
    """Each run is reported with its start and end, and the lane with why it was left."""
    shared.enable("scripted", place)
    sent = shared.hand("nothing", "raise", destination=place)
    first, second = (each["id"] for each in sent.deliveries())
    run(shared, process, sent)

    assert [hear(process) for _ in range(4)] == [
        Started(lane=sent.lane, delivery=first, attempt=1),
        Ended(),
        Started(lane=sent.lane, delivery=second, attempt=1),
        Ended(),
    ]
    done = hear(process)
    assert done == LaneDone(why="waiting", succeeded=done.succeeded)
    [seconds] = done.succeeded
    assert 0 < seconds < 60


def test_told_to_leave(shared: World, process: HandlerProcess, place: str) -> None:
    """After LeaveLane the process leaves the lane at the end of the current handler."""
    shared.enable("patient-one", place)
    flag = shared.flag(f"go-{place}")
    sent = shared.hand(f"wait_for:{flag}", "nothing", destination=place)
    run(shared, process, sent)
    assert isinstance(hear(process), Started)
    sent.until_begun()
    process.tell(LeaveLane())
    process.tell(LeaseUntil(until=time.monotonic() + 60))
    until(lambda: unread(process) == 0, "it has heard")
    flag.touch()

    assert hear(process) == Ended()
    done = hear(process)
    assert (done.why, len(done.succeeded)) == ("time", 1)
    assert sent.states() == ["succeeded", "pending"]


@pytest.mark.parametrize("deed", ["loop", "sleep", "fork", "hold_interpreter"])
def test_a_lease_that_ends(shared: World, process: HandlerProcess, place: str, deed: str) -> None:
    """A process whose lease ends kills itself, whatever the handler does, also when its parent is frozen."""
    shared.enable("patient-one", place)
    sent = shared.hand(deed, destination=place)
    run(shared, process, sent, lease=2.0)  # it has to connect first
    begun = sent.until_begun()  # and nobody listens: that is a frozen parent

    until(process.ended, "it has ended")
    for line in sent.journal("forked"):
        until(partial(gone, line["child"]), "the forked process has ended")
    assert begun["pid"] == process.pid


def test_a_lease_that_is_renewed(shared: World, process: HandlerProcess, place: str) -> None:
    """A process whose lease is renewed continues."""
    shared.enable("patient-one", place)
    sent = shared.hand("sleep:2", destination=place)
    run(shared, process, sent, lease=1.0)
    for _ in range(20):
        if sent.states() == ["succeeded"]:
            break
        process.tell(LeaseUntil(until=time.monotonic() + 5))
        time.sleep(0.2)

    assert [type(hear(process)) for _ in range(3)] == [Started, Ended, LaneDone]
    assert sent.states() == ["succeeded"]


PARENT = """
import sys, time
from receiver import settings
from receiver.worker.handler_process.bootstrap import init_message
from receiver.worker.handler_process.supervisor import HandlerSlot
from receiver.worker.leases import Leases
from receiver.worker.lane_run import run_lane
from receiver.protocol.registry import Subscription
from receiver.database.engine import open_engine
table = settings.load_settings()
url = table.database_url.get_secret_value()
slot = HandlerSlot(lambda: init_message(table, url))
subscription = Subscription(id=1, handler="patient-one", role="handler", patterns=("*",), timeout=600)
run_lane(slot, Leases(open_engine(url), "parent"), sys.argv[1], subscription, lease=600, leave_after=600)
"""


@pytest.mark.parametrize("deed", ["loop", "sleep", "fork"])
def test_a_parent_that_is_killed(shared: World, place: str, deed: str) -> None:
    """When the parent is killed, the handler process ends at once, with everything that the handler has started."""
    shared.enable("patient-one", place)
    sent = shared.hand(deed, destination=place)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, sent.lane], env=shared.environment())
    try:
        begun = sent.until_begun()
        until(lambda: deed != "fork" or sent.journal("forked"), "forked")
    finally:
        parent.kill()
        parent.wait(30)

    until(partial(gone, begun["pid"]), "the handler process has ended")
    for line in sent.journal("forked"):
        until(partial(gone, line["child"]), "the forked process has ended")


def test_what_is_printed_goes_nowhere(shared: World, process: HandlerProcess, place: str) -> None:
    """What a handler prints is discarded.

    What it logs becomes an event with its printable fields and the number of the others.
    """
    shared.enable("scripted", place)
    sent = shared.hand("print", "log", destination=place)
    uuid, delivery = sent.receipts[1].uuid, sent.deliveries()[1]["id"]
    with capture_logs() as lines:
        run(shared, process, sent)
        assert [type(hear(process)) for _ in range(5)] == [Started, Ended, Started, Ended, LaneDone]

    bound = {"handler": "scripted", "destination": place, "uuid": uuid, "delivery": delivery, "attempt": 1}
    assert lines == [
        {"event": "bed.assigned", "log_level": "info", "count": 7, "dropped": 1, **bound},
        {"event": "log.unnamed", "log_level": "warning", **bound},
    ]
    assert sent.states() == ["succeeded", "succeeded"]


def test_it_says_what_it_cannot_load(shared: World, place: str) -> None:
    """A handler that cannot be imported is reported by name when it is to run; the others run."""
    given = init_message(shared.settings(handlers=(PLUGIN,)), shared.url, handlers=("scripted", "nobody's"))
    process = HandlerProcess(given)
    try:
        process.start()
        shared.enable("scripted", place)
        sent = shared.hand("nothing", destination=place)
        now = time.monotonic()
        process.command(
            RunLanes(
                lanes=(("nobodys/d/source:s", 1),),
                owner="tester",
                handler="nobodys",
                destination="d",
                timeout=1,
                policy=RetryPolicy(max_attempts=1, on_failure="dead"),
                until=now + 60,
                leave_at=now + 60,
            )
        )
        printed = hear(process)
        assert isinstance(printed, CannotExecute)
        assert "handler nobodys is not installed on this host" in printed.error
        run(shared, process, sent)
        assert [type(hear(process)) for _ in range(3)] == [Started, Ended, LaneDone]
    finally:
        process.kill()


def test_a_broken_keyring(shared: World) -> None:
    """A process that cannot read the keyring reports it and ends."""
    damaged = shared.directory / "damaged.json"
    damaged.write_text("{")
    damaged.chmod(0o600)
    process = HandlerProcess(init_message(shared.settings(keyring=damaged), shared.url))
    try:
        with pytest.raises(ConfigurationError, match="damaged"):
            process.start()
        until(process.ended, "it has ended")
    finally:
        process.kill()


def test_nonsense_on_the_channel(shared: World) -> None:
    """A process that receives an invalid message ends."""
    process = HandlerProcess(init_message(shared.settings(), shared.url))
    try:
        process.tell(Ready())  # type: ignore[arg-type]  # what a parent never says
        until(process.ended, "it has ended")
    finally:
        process.kill()
    assert gone(process.pid)
