from __future__ import annotations

import shlex
import subprocess

from receiver.pipeline import Admitted
from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import SOURCE, Door, body
from tests.storage.operations.queries.helpers import refuse

STRANGER = "22222222-2222-4222-8222-222222222222"


def test_add(door: Door, run: Commands) -> None:
    """Messages of the source are accepted from then on, with any spelling of its id."""
    added = run.json("source", "add", "clinic", f"urn:uuid:{STRANGER.upper()}", "--name", "North Clinic")
    assert (added["source_id"], added["name"], added["enabled"]) == (STRANGER, "North Clinic", True)
    assert isinstance(door.judge(body(source=STRANGER)), Admitted)
    event, *_ = run.json("audit", "list", "--action", "source.add")
    assert (event["actor"], event["detail"]) == (ACTOR, {"source": STRANGER})


def test_messages_without_a_source(door: Door, run: Commands) -> None:
    """--none registers them; the list has null."""
    run("source", "add", "clinic", "--none")
    assert isinstance(door.judge(body(Source=None)), Admitted)
    assert [each["source_id"] for each in run.json("source", "list", "clinic")] == [SOURCE, None]
    run("source", "disable", "clinic", "--none")
    assert door.refuse(body(Source=None)).reason == "source_disabled"


def test_an_id_or_none(door: Door, run: Commands) -> None:
    """An id together with --none, and neither, are wrong usage."""
    for verb in ("add", "disable"):
        run.fails("source", verb, "clinic", status=2)
        run.fails("source", verb, "clinic", SOURCE, "--none", status=2)


def test_disable(door: Door, run: Commands) -> None:
    """A disabled source is refused, and can be added again."""
    assert run.json("source", "disable", "clinic", SOURCE)["enabled"] is False
    assert door.refuse(body()).reason == "source_disabled"
    run("source", "add", "clinic", SOURCE)
    assert isinstance(door.judge(body()), Admitted)
    assert "source list" in run.fails("source", "disable", "clinic", STRANGER)


def test_refused_sources_with_the_command_that_adds_them(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """The printed command registers the source."""
    refuse(door, ledger, body(source=STRANGER))
    line = run("source", "list", "--refused").stdout.splitlines()[-1]
    assert line == f"redox-receiver source add clinic {STRANGER}"
    run(*shlex.split(line)[1:])
    assert isinstance(door.judge(body(source=STRANGER)), Admitted)
    assert "no unknown source" in run("source", "list", "--refused").stdout


def test_an_id_that_looks_like_an_option(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """The id `-n7` of a refused message can be registered: it is not read as an option."""
    refuse(door, ledger, body(source="-n7"))
    (found,) = run.json("source", "list", "--refused")
    words = subprocess.run(
        ["/bin/sh", "-c", f'printf "%s\\n" {found["add"]}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    run(*words[1:])
    assert [each["source_id"] for each in run.json("source", "list")] == [SOURCE, "-n7"]


def test_a_value_that_is_not_an_id_is_not_shown(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """A source without the shape of an id may be a patient's data: only its digest is shown."""
    refuse(door, ledger, body(source="Ada Lovelace \x1b[2J"))
    assert "Ada" not in run("source", "list", "--refused").output
    (found,) = run.json("source", "list", "--refused", "--since", "1h")
    assert (found["source_id"], found["add"]) == (None, None)
    assert len(found["source_digest"]) == 64


def test_since_requires_refused(run: Commands) -> None:
    """--since is valid only with --refused."""
    run.fails("source", "list", "--since", "1h", status=2)
