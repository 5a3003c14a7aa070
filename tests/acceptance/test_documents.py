"""Every command in README's "Install" and in OPERATING.md runs on a live machine.

A command that is added there or removed fails here first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from receiver.simulator.fake_redox import FakeRedox
from tests.support.machine import SOURCE, Machine, machine
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "deploy" / "OPERATING.md").read_text()
PLUGIN = """
from receiver.handlers import handler

@handler("PatientAdmin.*", name="register", max_attempts=1)
def register(message, context):
    message.data["Nothing of this name"]
"""
RETRY = "redox-receiver deliveries retry --handler register --error-class KeyError --reason 'fixed in 1.4.2'"
# Command of the page → command to run. Words in capitals and numbers are replaced by this machine's values.
COMMANDS = {
    "redox-receiver destination add lab --environment development --token-out lab.token": None,
    "redox-receiver source add lab 7ce6f387-c33c-417d-8682-81e83628cbd9 --name 'North Clinic'": None,
    "redox-receiver simulate --destination lab --token-file lab.token": (
        "redox-receiver simulate --destination lab --token-file lab.token --url {url} --kind PatientAdmin.Arrival "
        f"--source {SOURCE}"
    ),
    "redox-receiver status": None,
    "redox-receiver check": None,
    "redox-receiver handlers check": None,
    "redox-receiver source list --refused": None,
    "redox-receiver audit list --action message.refuse": None,
    "redox-receiver deliveries list --state dead": None,
    "redox-receiver deliveries list --state pending": None,
    "redox-receiver keys new payload": None,
    "redox-receiver deliveries show 1205": "redox-receiver deliveries show {dead}",
    f"{RETRY} --dry-run": None,
    RETRY: None,
    "redox-receiver messages list --state quarantined": None,
    "redox-receiver outbox list --state pending": None,
    "redox-receiver credential add lab --kind token": None,
    "redox-receiver db backup DIR": "redox-receiver db backup {root}/backup",
    "redox-receiver audit verify": None,
    "redox-receiver audit export --format jsonl --out audit.jsonl": None,
    "redox-receiver audit report --patient --reason 'request of the patient' < patient.txt": (
        "redox-receiver audit report --patient --reason 'request of the patient'"
    ),
    "redox-receiver db upgrade": None,
}
# What the shell reads from a file for them.
STDIN = {"redox-receiver audit report --patient --reason 'request of the patient' < patient.txt": "4711\nMR\n"}
# They exit with status 1 here, because a handler fails.
FINDING = {"redox-receiver status", "redox-receiver check"}
# These cannot run on a machine that serves, or need something else: their help shows that they exist.
NAMED = {
    "redox-receiver up --data-dir /srv/redox",
    "redox-receiver keys init",
    "redox-receiver serve",
    "redox-receiver worker",
    "redox-receiver reconcile --from FILE --column 'Log ID'",
}
# The text mentions commands without the program's name.
SHORT = {
    "messages replay": "",
    "messages release": "",
    "messages discard": "",
    "outbox retry": "",
    "outbox show ID": "",
    "outbox retry --state held": "run",
    "deliveries skip": "",
    "deliveries resume": "run",
    "db restore DIR": "",
    "db upgrade": "",
    "db restore": "",
    "db restore --replaces DATABASE": "",
    "keys activate ID": "",
    "keys count": "",
    "keys retire ID": "",
    "credential revoke ID --grace 1h": "",
    "credential revoke ID --undo": "",
    "credential set ID --expires 30d": "",
}


def chapters() -> str:
    """Return "Install" of the README, and all of OPERATING.md."""
    install = re.search(r"^## Install$.*?(?=^## )", README, re.DOTALL | re.MULTILINE)
    assert install
    return f"{install[0]}\n{OPERATING}"


def phrases() -> tuple[list[str], list[str]]:
    """Return the commands, and the mentions without the program's name, in order and each once."""
    text = chapters()
    console = [line[2:].partition("     #")[0].strip() for line in text.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = [re.sub(r"\s+", " ", each) for each in re.findall(r"`([^`]+)`", prose)]
    commands = [each for each in [*console, *quoted] if each.startswith("redox-receiver ")]
    short = [
        re.sub(r" --[a-z-]+ (?:FILE|…).*", "", each)
        for each in quoted
        if re.match(r"(?:messages|outbox|db|credential|deliveries|keys) [a-z]+", each)
    ]
    return list(dict.fromkeys(commands)), list(dict.fromkeys(short))


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine with a handler that fails."""
    with machine() as made:
        made.plug_in("broken", PLUGIN)
        made.up("--workers", "1")
        yield made


def killed(at: Machine) -> list[dict[str, object]]:
    """Send a message on which the handler fails, and return its dead delivery."""
    redox = FakeRedox(
        at.url, "lab", (at.root / "lab.token").read_text().strip(), source_id="7ce6f387-c33c-417d-8682-81e83628cbd9"
    )
    until(lambda: redox.send(redox.body("PatientAdmin.Arrival", seed=7)).status == 200)
    until(lambda: bool(at.json("deliveries", "list", "--state", "dead")))
    dead: list[dict[str, object]] = at.json("deliveries", "list", "--state", "dead")
    return dead


def test_every_command_is_here() -> None:
    """This file runs exactly the commands of the pages."""
    commands, short = phrases()
    assert set(commands) == {*COMMANDS, *NAMED}
    assert set(short) == set(SHORT)


def test_every_command_runs(running: Machine) -> None:
    """Every command succeeds on a live machine, in the order of the pages."""
    dead: list[dict[str, object]] = []
    for phrase in phrases()[0]:
        if phrase in NAMED:
            running.run(*shlex.split(phrase)[1 : 3 if "keys" in phrase else 2], "--help")
            continue
        if phrase.endswith("--state dead"):
            dead = killed(running)
        if phrase.startswith("redox-receiver simulate"):
            running.run("source", "add", "lab", SOURCE)
        run = (COMMANDS[phrase] or phrase).format(url=running.url, root=running.root, dead=dead[0]["id"] if dead else 0)
        if phrase in FINDING:
            until(lambda: bool(running.findings()))
            running.run(*shlex.split(run)[1:], fails=True)
            continue
        running.run(*shlex.split(run)[1:], stdin=STDIN.get(phrase))


def test_every_mention_is_a_command(running: Machine) -> None:
    """Every command that the text mentions exists, with its options."""
    for phrase, run in SHORT.items():
        words = [word for word in phrase.split() if word not in ("ID", "DIR")]
        if run:
            running.run(*words, "--reason", "as the page says")
        else:
            running.run(*words, "--help")
