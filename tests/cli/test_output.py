from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from receiver.cli import output

UUID_ = UUID("0192f0c1-2345-7678-9abc-def012345678")
EASTERN = timezone(timedelta(hours=-5))


def test_json_is_one_document_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Times are ISO 8601 in UTC, bytes hexadecimal, uuids text; all else is as it is."""
    output.rows([{"at": datetime(2026, 1, 1, 7, tzinfo=EASTERN), "sha256": b"\x01\xff", "uuid": UUID_, "require": ["a"],
                  "detail": {"n": 1}, "none": None, "yes": True}], ["at"], as_json=True, nothing="")
    assert json.loads(capsys.readouterr().out) == [
        {"at": "2026-01-01T12:00:00.000000Z", "sha256": "01ff", "uuid": str(UUID_), "require": ["a"],
         "detail": {"n": 1}, "none": None, "yes": True}]


def test_a_table_shows_the_columns_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """By their names, in their order; without rows a sentence says what to do."""
    output.rows([{"b": True, "a": None, "c": 3}], ["c", "b"], as_json=False, nothing="")
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["c", "b"]
    assert line.split() == ["3", "yes"]
    output.rows([], ["a"], as_json=False, nothing="nothing yet")
    assert capsys.readouterr().out == "nothing yet\n"


def test_no_line_is_wider_than_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is in the cells: they are folded, and nothing of them is lost."""
    long = "x" * 300
    output.rows([{"a": long, "b": long, "at": datetime(2026, 1, 1, tzinfo=UTC)}], ["a", "b", "at"], as_json=False,
                nothing="")
    output.row({"a": long, "b": 1}, as_json=False)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert said.count("x") == 900


HOSTILE = {
    "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title\x07",
    "a\nb\rc\td": r"a\nb\rc\td",
    "\u202eevil\u2066": r"\u202eevil\u2066",
    "\x9b31m": r"\x9b31m",
    "\U000e0041": r"\U000e0041",
    "\u2028": r"\u2028",
    "[bold]Zoë[/bold]": "[bold]Zoë[/bold]",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_nothing_stored_acts_on_a_terminal(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters, ANSI sequences and changes of direction are shown, not sent; markup is text."""
    output.rows([{"id": text, "detail": {"source": text}, "list": [text]}], ["id", "detail", "list"], as_json=False,
                nothing="")
    output.row({"id": text}, as_json=False)
    said = capsys.readouterr().out
    assert shown in said
    assert f"source={shown}" in said
    assert not any(not each.isprintable() for each in said.replace("\n", ""))
    output.document({"id": text})
    told = capsys.readouterr().out
    assert json.loads(told) == {"id": text}
    assert told.isascii()


def seen_on_a_terminal(code: str) -> str:
    """What a program writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, stdin=follower,
                             env=environment | {"TERM": "xterm-256color", "COLUMNS": "80"})
    os.close(follower)
    said = b""
    try:
        while piece := os.read(leader, 65536):
            said += piece
    except OSError:
        pass  # the other side is closed
    finally:
        os.close(leader)
        assert child.wait(60) == 0
    return said.decode()


TABLE = "from receiver.cli import output; output.rows([{'state': 'dead'}], ['state'], as_json=False, nothing='')"
BAR = ("from receiver.cli import output\n"
       "with output.progress('deliveries skipped', 3) as advance:\n    advance(2)")


def test_colour_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal what is dead is red; in a pipe there are no escape sequences."""
    assert "\x1b[31m" in seen_on_a_terminal(TABLE)
    assert b"\x1b" not in subprocess.run([sys.executable, "-c", TABLE], capture_output=True, check=True).stdout


def test_progress_is_for_terminals() -> None:
    """On a terminal a bar shows how far it is; elsewhere nothing is said."""
    assert "deliveries skipped" in seen_on_a_terminal(BAR)
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
