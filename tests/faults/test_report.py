"""The report: what it says of each part, and of one that did not come to its end."""

from __future__ import annotations

import pytest

from tests.faults import clocks, floods, hosts, proxied, recovery, rounds, soak
from tests.faults.__main__ import SECTIONS, run
from tests.faults.report import Section, Tell, renewed, report
from tests.faults.rounds import Round, Run, section


def _ends_badly(_tell: Tell) -> Section:
    raise AssertionError("the server did not come back")


def _is_well(_tell: Tell) -> Section:
    return Section(title="Small things", command="python -m small.things", text="None was lost.\n")


def test_the_rounds_tell_what_was_violated() -> None:
    """And the command that repeats it."""
    made = Run(
        seed=7,
        rounds=[Round(mishap="worker_killed", lasted=1.0, accepting=0.5)],
        delivering=[3.0],
        wrong=["messages 1: lost"],
        counts={"messages recorded": 1},
    )
    told = report([section(made, "./tests/faults/run --rounds 1 --seed 7")])
    assert "    ./tests/faults/run --rounds 1 --seed 7\n" in told
    assert "**Violated: 1**\n- messages 1: lost\n" in told
    assert "| SIGKILL of a worker, on either host | 1 | 1.0 | 0.50 | 0.50 |" in told


def test_a_part_that_fails_is_told_and_the_others_run() -> None:
    """The report is written all the same."""
    made = list(run([_ends_badly, _is_well], lambda _line: None))
    assert [each.violations for each in made] == [["AssertionError: the server did not come back"], ()]
    told = report(made)
    assert "**Violated: 1**\n- AssertionError: the server did not come back" in told
    assert "## Small things\n\n    python -m small.things\n\n**Nothing was violated.**\n\nNone was lost.\n" in told


def test_a_report_that_is_not_whole_says_so() -> None:
    """It names what is missing, and the command that it was made by."""
    assert "**Not whole**: without hosts, soak.\n" in report([], "./run --soak 1", missing=["hosts", "soak"])
    assert "\n    ./run --soak 1\n" in report([], "./run --soak 1")
    assert "Not whole" not in report([])


def test_a_chapter_is_renewed() -> None:
    """It takes the place of the one of its title, and nothing else changes."""
    made = [Section(title=title, command=f"./{title}", text="Old.") for title in ("One", "Two", "Three")]
    new = Section(title="Two", command="./again", text="New.", violations=["lost"])
    assert renewed(report(made), new) == report([made[0], new, made[2]])
    with pytest.raises(ValueError, match="Four"):
        renewed(report(made), Section(title="Four", command="./x", text=""))


def test_the_rounds_come_first() -> None:
    """What `./tests/faults/run` runs alone is the first chapter."""
    assert SECTIONS[0].__module__ == "tests.faults.rounds"


def test_no_part_is_left_out() -> None:
    """Whatever has a chapter to give is in the report."""
    assert {each.__module__ for each in SECTIONS} == {
        each.__name__ for each in (rounds, recovery, hosts, clocks, floods, proxied, soak)
    }
