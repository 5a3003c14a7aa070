"""Notices on their way: the webhook's document, and the command's mail."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from receiver.notices import channels
from receiver.notices.channels import NoticeNotSent
from receiver.notices.plan import Condition, Notice

NOTICE = Notice(
    event="opened",
    condition=Condition(
        code="dead", destination="lab", text="lab: 3 deliveries are dead.", fix="redox-receiver status"
    ),
    left_out=2,
)


def test_a_webhook() -> None:
    """One post: a document with stable keys, under a new id."""
    posted: list[tuple[str, str, str, int, bytes]] = []
    send = channels.webhook("https://ops.example", "whsec_x", "one", lambda *given: posted.append(given))
    send(NOTICE)
    send(NOTICE)
    (url, secret, first, timestamp, body), (_, _, second, _, _) = posted
    assert (url, secret) == ("https://ops.example", "whsec_x")
    assert first != second
    document = json.loads(body)
    assert document["type"] == "redox_receiver.finding.opened"
    assert document["data"] == {
        "code": "dead",
        "destination": "lab",
        "text": "lab: 3 deliveries are dead.",
        "fix": "redox-receiver status",
        "host": "one",
        "left_out": 2,
    }
    assert timestamp > 1_700_000_000


def test_a_command(tmp_path: Path) -> None:
    """It reads a mail: subject, text, and the command that fixes it. No shell sees the line."""
    out = tmp_path / "mail; touch x"
    program = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    channels.command(shlex.join([sys.executable, "-c", program, str(out)]), "one")(NOTICE)
    lines = out.read_text().splitlines()
    assert lines[0] == "Subject: [redox-receiver] lab: dead needs you"
    assert "lab: 3 deliveries are dead." in lines
    assert "To fix it: redox-receiver status" in lines
    assert "2 other notices were left out in the last hour: run `redox-receiver status`." in lines
    assert [each.name for each in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("line", "problem"),
    [(shlex.join([sys.executable, "-c", "raise SystemExit(3)"]), "exit status 3"), ("/nowhere/mail", "FileNotFound")],
)
def test_a_command_that_fails(line: str, problem: str) -> None:
    """The notice counts as not sent."""
    with pytest.raises(NoticeNotSent, match=problem):
        channels.command(line, "one")(NOTICE)
