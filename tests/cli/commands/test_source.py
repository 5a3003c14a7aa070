from __future__ import annotations

import shlex
import subprocess

from receiver.pipeline import Admitted
from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import SOURCE, Door, body
from tests.storage.operations.test_queries import refuse

STRANGER = "22222222-2222-4222-8222-222222222222"


def test_add_lets_a_source_in(door: Door, run: Commands) -> None:
    """Its messages are taken from then on, however the id is written."""
    added = run.json("source", "add", "clinic", f"urn:uuid:{STRANGER.upper()}", "--name", "North Clinic")
    assert (added["source_id"], added["name"], added["enabled"]) == (STRANGER, "North Clinic", True)
    assert isinstance(door.judge(body(source=STRANGER)), Admitted)
    told, *_ = run.json("audit", "list", "--action", "source.add")
    assert (told["actor"], told["detail"]) == (ACTOR, {"source": STRANGER})


def test_messages_that_name_none(door: Door, run: Commands) -> None:
    """--none stands for them, and is listed as null."""
    run("source", "add", "clinic", "--none")
    assert isinstance(door.judge(body(Source=None)), Admitted)
    assert [each["source_id"] for each in run.json("source", "list", "clinic")] == [SOURCE, None]
    run("source", "disable", "clinic", "--none")
    assert door.refuse(body(Source=None)).reason == "source_disabled"


def test_one_of_the_two(door: Door, run: Commands) -> None:
    """An id and --none together, or neither, is wrong usage."""
    for verb in ("add", "disable"):
        run.fails("source", verb, "clinic", status=2)
        run.fails("source", verb, "clinic", SOURCE, "--none", status=2)


def test_disable_refuses_it(door: Door, run: Commands) -> None:
    """A disabled source is refused, and can be added again."""
    assert run.json("source", "disable", "clinic", SOURCE)["enabled"] is False
    assert door.refuse(body()).reason == "source_disabled"
    run("source", "add", "clinic", SOURCE)
    assert isinstance(door.judge(body()), Admitted)
    assert "source list" in run.fails("source", "disable", "clinic", STRANGER)


def test_refused_ones_with_the_line_that_adds_them(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """What is printed can be pasted as it stands, and then the source is in."""
    refuse(door, ledger, body(source=STRANGER))
    line = run("source", "list", "--refused").stdout.splitlines()[-1]
    assert line == f"redox-receiver source add clinic {STRANGER}"
    run(*shlex.split(line)[1:])
    assert isinstance(door.judge(body(source=STRANGER)), Admitted)
    assert "no unknown source" in run("source", "list", "--refused").stdout


def test_an_id_that_reads_as_an_option_stays_an_id(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """A message that claims the source `-n7` is an id when its operator registers it, not an option."""
    refuse(door, ledger, body(source="-n7"))
    (found,) = run.json("source", "list", "--refused")
    words = subprocess.run(
        ["/bin/sh", "-c", f'printf "%s\\n" {found["add"]}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    run(*words[1:])
    assert [each["source_id"] for each in run.json("source", "list")] == [SOURCE, "-n7"]


def test_what_is_no_id_is_not_shown(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """A claim that is not shaped like an id may be anybody's data: only its digest is told."""
    refuse(door, ledger, body(source="Ada Lovelace \x1b[2J"))
    assert "Ada" not in run("source", "list", "--refused").output
    (found,) = run.json("source", "list", "--refused", "--since", "1h")
    assert (found["source_id"], found["add"]) == (None, None)
    assert len(found["source_sha256"]) == 64


def test_since_goes_with_refused(run: Commands) -> None:
    """Registered sources have no time to look back to."""
    run.fails("source", "list", "--since", "1h", status=2)
