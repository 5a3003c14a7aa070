"""Two incidents, from the first finding of `status` until it shows none.

Every command was named by an earlier command, or is in deploy/OPERATING.md.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from receiver.samples import sample
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import FeedSimulator
from tests.support.machine import SOURCE, Machine, machine
from tests.support.waiting import until

FAMILY = "Quibbleworthington"
# The plugin before and after its author fixed the bug.
PLUGIN = """
import os
from receiver.handlers import handler

WARDS = {"other": "north"}

def ward_of(name):
    return WARDS[name]

@handler("PatientAdmin.*", name="admit", max_attempts=1)
def admit(message, context):
    name = message.data["Patient"]["Demographics"]["LastName"]
    ward_of(name)
    with open(os.environ["ADMITTED"], "a") as admitted:
        admitted.write(message.log_id + "\\n")
"""
FIXED = PLUGIN.replace("WARDS[name]", 'WARDS.get(name, "south")')


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine with a plugin that has a bug."""
    with machine() as made:
        made.plug_in("wards", PLUGIN)
        made.environment |= {"ADMITTED": str(made.root / "admitted"), "RECEIVER_PAUSE_AFTER_DEAD": "1000"}
        made.up("--workers", "1")
        yield made


def bound(at: Machine, destination: str) -> FakeRedox:
    """Return Redox for a destination to which the worker has bound the handler."""
    redox = FakeRedox(at.url, destination, at.register(destination).read_text().strip(), source_id=SOURCE)

    until(
        lambda: (
            count(
                at,
                "SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id WHERE t.name = %s",
                destination,
            )
            == 1
        )
    )
    return redox


def count(at: Machine, query: str, *values: str) -> int:
    """Return how many rows a query finds. For waiting: a command takes a second to start."""
    with psycopg.connect(make_url(at.cluster.url).set(drivername="postgresql").render_as_string()) as connection:
        return connection.execute(query, values).rowcount


def settled(at: Machine) -> bool:
    """Return whether nothing is pending."""
    return count(at, "SELECT FROM deliveries WHERE state = 'pending'") == 0


def fixes(printed: str) -> list[list[str]]:
    """Return the commands that `status` names, ready to paste."""
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  redox-receiver ")]


def test_a_bug_has_killed_400_deliveries(running: Machine) -> None:
    """`status` leads to the bug without showing a patient's name. After the fix all deliveries run again, in
    order."""
    redox = bound(running, "lab")
    ledger = AttemptLog()
    patient = sample.person(11, family=FAMILY)
    until(
        lambda: (
            redox.send(redox.body("PatientAdmin.Arrival", seed=1, patient=patient)).status == 200
            and count(running, "SELECT FROM deliveries") > 0
        )
    )

    def send(number: int) -> bool:
        with FeedSimulator(redox, name=f"feed-{number}", ledger=ledger, deadline=60) as feed:
            return feed.run(
                redox.body("PatientAdmin.Arrival", seed=10_000 * number + each, patient=patient) for each in range(100)
            )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(send, range(1, 5)))
    until(lambda: settled(running))

    printed = running.status()
    assert "deliveries of admit are dead (KeyError)" in printed
    assert FAMILY not in printed
    (command,) = [each for each in fixes(printed) if each[:2] == ["deliveries", "list"]]
    dead = json.loads(running.run(*command, "--json", "--limit", "1000"))
    assert len(dead) >= 400

    shown = running.run("deliveries", "show", str(dead[0]["id"]))
    admit, ward_of = (PLUGIN.splitlines().index(line) + 1 for line in ("    ward_of(name)", "    return WARDS[name]"))
    assert f"  wards:{admit}:admit\n  wards:{ward_of}:ward_of\n" in shown
    assert FAMILY not in shown

    (running.root / "wards.py").write_text(FIXED)
    before = running.part("worker-1")
    os.kill(before, signal.SIGTERM)
    until(lambda: running.part("worker-1") != before)

    chosen = ("--handler", "admit", "--error-class", "KeyError", "--reason", "wards knows the south now")
    dry = running.json("deliveries", "retry", *chosen, "--dry-run")
    assert len(dry["done"]) == len(dead)
    assert settled(running)
    assert f"retried: {len(dead)} deliver" in running.run("deliveries", "retry", *chosen)
    until(lambda: settled(running))

    assert count(running, "SELECT FROM deliveries WHERE state <> 'succeeded'") == 0
    admitted = (running.root / "admitted").read_text().split()
    assert set(ledger.accepted()) <= set(admitted)
    assert len(admitted) == len(set(admitted)) >= len(dead)
    assert ledger.overtaken(admitted) == []
    message = running.json("audit", "list", "--action", "delivery.retry", "--limit", "1000")
    assert len({each["subject"] for each in message}) == len(dead)
    assert all("@" in each["actor"] for each in message)


def test_redox_has_paused_a_feed(running: Machine) -> None:
    """The feed of an unregistered source stops. `status` names the command that shows why, and that the command that
    registers the source. Then the feed continues by itself, complete and in order."""
    bound(running, "ward")
    redox = FakeRedox(running.url, "ward", (running.root / "ward.token").read_text().strip(), source_id=str(uuid4()))
    ledger = AttemptLog()
    patient = sample.person(12, family="other")
    bodies = [redox.body("PatientAdmin.Discharge", seed=seed, patient=patient) for seed in range(20)]
    with (
        FeedSimulator(redox, name="new clinic", time_scale=0.02, deadline=150, ledger=ledger) as feed,
        ThreadPoolExecutor(1) as threads,
    ):
        sending = threads.submit(feed.run, bodies)
        until(lambda: len(ledger.attempts) >= 3)
        printed = running.status()
        assert "ward: Redox was refused (source_unknown) and has probably paused the feed" in printed
        command, *_ = [each for each in fixes(printed) if "ward" in each]
        (add,) = [line for line in running.run(*command).splitlines() if line.startswith("redox-receiver source add")]
        assert not sending.done()
        running.run(*shlex.split(add)[1:])
        assert sending.result(150)
    statuses = [attempt.status for attempt in ledger.attempts]
    assert statuses == [403] * (len(statuses) - 20) + [200] * 20
    until(lambda: settled(running))
    assert not [each for each in running.findings().values() if each["destination"] == "ward"]
    kept = running.json("messages", "list", "--source-id", redox.source_id, "--limit", "100")
    assert len(kept) == 20
    assert set(ledger.accepted()) == {each["log_id"] for each in kept}
