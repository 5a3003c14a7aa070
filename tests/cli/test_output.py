from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from typing import Final
from uuid import UUID

import pytest

from receiver.cli import output
from tests.cli.conftest import Commands
from tests.storage.door import Door

UUID_ = UUID("0192f0c1-2345-7678-9abc-def012345678")
EASTERN = timezone(timedelta(hours=-5))


def test_json_is_one_document_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Times are ISO 8601 in UTC, bytes are hexadecimal, UUIDs are text. Other values are unchanged."""
    output.rows(
        [
            {
                "at": datetime(2026, 1, 1, 7, tzinfo=EASTERN),
                "sha256": b"\x01\xff",
                "uuid": UUID_,
                "require": ["a"],
                "detail": {"n": 1},
                "none": None,
                "yes": True,
            }
        ],
        ["at"],
        as_json=True,
        nothing="",
    )
    assert json.loads(capsys.readouterr().out) == [
        {
            "at": "2026-01-01T12:00:00.000000Z",
            "sha256": "01ff",
            "uuid": str(UUID_),
            "require": ["a"],
            "detail": {"n": 1},
            "none": None,
            "yes": True,
        }
    ]


def test_a_table_shows_the_columns_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A table has the requested columns in that order. Without rows, a sentence says what to do."""
    output.rows([{"b": True, "a": None, "c": 3}], ["c", "b"], as_json=False, nothing="")
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["c", "b"]
    assert line.split() == ["3", "yes"]
    output.rows([], ["a"], as_json=False, nothing="nothing yet")
    assert capsys.readouterr().out == "nothing yet\n"


class TestWidth:
    """A table fits the terminal. Elsewhere each row is one line."""

    ROW: Final = {
        "id": 81234,
        "uuid": str(UUID_),
        "kind": "PatientAdministration.NewPatientRegistered",
        "lane": f"register/clinic/source:{UUID_}",
        "says": "some words that can be wrapped at their spaces",
        "at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    ORDER: Final = ("id", "says", "kind", "uuid", "at", "lane")

    def code(self, call: str) -> str:
        return (
            f"import datetime\nfrom receiver.cli import output\nfound = {self.ROW!r}\n{call.format(order=self.ORDER)}"
        )

    def test_in_a_pipe_nothing_is_folded(self) -> None:
        """In a pipe each row is one line, for `grep`, whatever COLUMNS says."""
        code = self.code("output.rows([found], {order}, as_json=False, nothing='')\noutput.row(found, as_json=False)")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=os.environ | {"COLUMNS": "40"}
        )
        _, _, line, *others = done.stdout.splitlines()
        for value in self.ROW.values():
            assert output.cell(value) in line
        assert len(others) == len(self.ROW)
        assert done.stderr == ""

    @pytest.mark.parametrize("columns", [60, 80, 100, 120, 160, 250])
    def test_on_a_terminal_no_word_is_broken(self, columns: int) -> None:
        """Ids, kinds and lanes are never broken. A column without space is named instead of shown."""
        printed = plain(
            seen_on_a_terminal(self.code("output.rows([found], {order}, as_json=False, nothing='')"), columns=columns)
        )
        table, _, note = printed.partition("the terminal is too narrow for")
        assert max(map(len, table.splitlines())) <= columns
        head, words = table.splitlines()[0].split(), table.split()
        for name in self.ORDER:
            shown = set(output.cell(self.ROW[name]).split()) <= set(words)
            assert shown is (name in head)
            assert shown is not (name in note.partition(":")[0].strip().split(", "))
        assert head[0] == "id"

    def test_the_width_is_used(self) -> None:
        """A wide terminal shows everything, each row on one line."""
        printed = plain(
            seen_on_a_terminal(self.code("output.rows([found], {order}, as_json=False, nothing='')"), columns=250)
        )
        assert len(printed.splitlines()) == 3

    def test_one_row_is_wrapped_between_words(self) -> None:
        """A value without a space that is wider than the terminal is on a line of its own, unbroken."""
        printed = plain(seen_on_a_terminal(self.code("output.row(found, as_json=False)"), columns=40))
        assert str(self.ROW["lane"]) in printed
        assert "some words that can be wrapped at" in printed
        assert "some words that can be wrapped at their" not in printed

    def test_columns_are_chosen(self, run: Commands, door: Door) -> None:
        """--columns takes every JSON key, in any order. Another name is refused with the list of names."""
        head, _, line = run("destination", "list", "--columns", "path,name, reply_with").stdout.splitlines()
        assert head.split() == ["path", "name", "reply_with"]
        assert line.split() == ["/redox/clinic", "clinic"]
        assert run.json("destination", "list", "--columns", "name") == [{"name": "clinic"}]
        assert "choose from" in run.fails("destination", "list", "--columns", "nmae", status=2)


def plain(printed: str) -> str:
    """Return what was sent to a terminal, without colors."""
    return re.sub("\x1b\\[[0-9;]*m", "", printed).replace("\r", "")


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
    """Control characters, ANSI sequences and changes of direction are shown escaped. Markup is shown as text."""
    output.rows(
        [{"id": text, "detail": {"source": text}, "list": [text]}], ["id", "detail", "list"], as_json=False, nothing=""
    )
    output.row({"id": text}, as_json=False)
    printed = capsys.readouterr().out
    assert shown in printed
    assert f"source={shown}" in printed
    assert not any(not each.isprintable() for each in printed.replace("\n", ""))
    output.document({"id": text})
    message = capsys.readouterr().out
    assert json.loads(message) == {"id": text}
    assert message.isascii()


def seen_on_a_terminal(code: str, columns: int = 80) -> str:
    """Return what a program writes to a terminal."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=follower,
        stderr=follower,
        stdin=follower,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": str(columns)},
    )
    os.close(follower)
    printed = b""
    try:
        while piece := os.read(leader, 65536):
            printed += piece
    except OSError:
        pass  # the program has closed the terminal
    finally:
        os.close(leader)
        assert child.wait(60) == 0
    return printed.decode()


TABLE = "from receiver.cli import output; output.rows([{'state': 'dead'}], ['state'], as_json=False, nothing='')"
BAR = "from receiver.cli import output\nwith output.progress('deliveries skipped', 3) as advance:\n    advance(2)"


def test_colour_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal `dead` is red. A pipe gets no escape sequences."""
    assert "\x1b[31m" in seen_on_a_terminal(TABLE)
    assert b"\x1b" not in subprocess.run([sys.executable, "-c", TABLE], capture_output=True, check=True).stdout


def test_progress_is_for_terminals() -> None:
    """A terminal shows a progress bar. Elsewhere nothing is printed."""
    assert "deliveries skipped" in seen_on_a_terminal(BAR)
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
