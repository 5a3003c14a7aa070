"""`reconcile` compares Redox's delivery log with the recorded messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import Commands
from tests.storage.door import Door, body
from tests.storage.hand import arrive

HERE = ("log-1", "log-2", "log-3")


@pytest.fixture
def arrived(door: Door, ledger: MessageLedger) -> None:
    """Two messages and a query."""
    arrive(door, ledger, body("log-1"), body("log-2"), body("log-3", kind="PatientSearch.Query"))


@pytest.mark.usefixtures("arrived")
def test_all_there(run: Commands, tmp_path: Path) -> None:
    """If every message in the log is recorded, queries included, nothing is missing."""
    (tmp_path / "log.csv").write_text("Log ID,Patient\n" + "".join(f"{each},Ada\n" for each in HERE))
    message = run.json(
        "reconcile", "--from", str(tmp_path / "log.csv"), "--column", "Log ID", "--destination", "clinic"
    )
    assert message == {"named": 3, "recorded": 3, "missing": 0, "unusable": 0, "messages": []}
    assert "nothing is missing" in run("reconcile", "--from", str(tmp_path / "log.csv"), "--column", "Log ID").stdout


@pytest.mark.usefixtures("arrived")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", '\ufeffid\nlog-1\nlost-1\nlost-1\n"Ada, born 1815"\nlog-2\n'),
        ("log.jsonl", "".join(json.dumps({"id": each}) + "\n\n" for each in ("log-1", "lost-1", None, "log-2"))),
    ],
)
def test_something_is_missing(run: Commands, tmp_path: Path, name: str, content: str) -> None:
    """Each missing message is listed once, with its line. Lines without an id are counted, and not printed."""
    (tmp_path / name).write_text(content)
    done = run("reconcile", "--from", str(tmp_path / name), "--json", status=1)
    message = json.loads(done.stdout)
    assert message == {
        "named": 3,
        "recorded": 2,
        "missing": 1,
        "unusable": 1,
        "messages": [{"line": 3, "log_id": "lost-1"}],
    }
    assert "ask Redox to send them again" in done.stderr
    done = run("reconcile", "--from", str(tmp_path / name), status=1)
    assert "lost-1" in done.stdout
    assert "Ada" not in done.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "a,b\n1,2\n", "with one of: a, b"),
        ("log.csv", "", "with one of: none"),
        ("log.csv", "a\n", "--column"),
        ("log.jsonl", '{"a": 1, "b": 2}\n', "with one of: a, b"),
        ("log.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("log.jsonl", "{\n", "line 1 is not valid JSON"),
        ("log.csv", "a\n\udcff\n", "not valid CSV in UTF-8"),
    ],
)
def test_a_file_that_tells_nothing(run: Commands, tmp_path: Path, name: str, content: str, message: str) -> None:
    """The error says what is wrong with the file, and which option fixes it."""
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    assert message in run.fails("reconcile", "--from", str(tmp_path / name))


@pytest.mark.usefixtures("arrived")
def test_another_destination(run: Commands, tmp_path: Path) -> None:
    """Messages to another destination do not count. An unknown destination is an error."""
    (tmp_path / "log.csv").write_text("id\nlog-1\n")
    run("destination", "add", "ward")
    run("reconcile", "--from", str(tmp_path / "log.csv"), "--destination", "ward", status=1)
    assert "destination list" in run.fails("reconcile", "--from", str(tmp_path / "log.csv"), "--destination", "nobody")
