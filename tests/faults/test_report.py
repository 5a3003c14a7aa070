"""The report: one chapter for each part, also for a part that ended with an error."""

from __future__ import annotations

import pytest

from tests.faults import clocks, floods, hosts, proxied, recovery, rounds, soak
from tests.faults.__main__ import PARTS, run
from tests.faults.report import Progress, Section, replace_section, report
from tests.faults.rounds import Round, Run, section


def _fails(_progress: Progress) -> Section:
    raise AssertionError("the server did not come back")


def _succeeds(_progress: Progress) -> Section:
    return Section(title="Small things", command="python -m small.things", text="None was lost.\n")


def test_the_chapter_of_the_rounds() -> None:
    """It has the command that repeats it, the violations, and a row for each fault."""
    made = Run(
        seed=7,
        rounds=[Round(fault="worker_killed", lasted=1.0, accepting=0.5)],
        delivering=[3.0],
        violations=["messages 1: lost"],
        counts={"messages recorded": 1},
    )
    text = report([section(made, "./tests/faults/run --rounds 1 --seed 7")])
    assert "    ./tests/faults/run --rounds 1 --seed 7\n" in text
    assert "**Violations: 1**\n- messages 1: lost\n" in text
    assert "| SIGKILL of a delivery worker, on either host | 1 | 1.0 | 0.50 | 0.50 |" in text


def test_a_part_that_fails() -> None:
    """It is a violation in the report, and the other parts run."""
    made = list(run([_fails, _succeeds], lambda _line: None))
    assert [each.violations for each in made] == [["AssertionError: the server did not come back"], ()]
    text = report(made)
    assert "**Violations: 1**\n- AssertionError: the server did not come back" in text
    assert "## Small things\n\n    python -m small.things\n\n**No violations.**\n\nNone was lost.\n" in text


def test_an_incomplete_report() -> None:
    """It names the parts that did not run, and the command that made it."""
    assert "**Incomplete**: hosts, soak did not run.\n" in report([], "./run --soak 1", missing=["hosts", "soak"])
    assert "\n    ./run --soak 1\n" in report([], "./run --soak 1")
    assert "Incomplete" not in report([])


def test_a_chapter_is_replaced() -> None:
    """A new chapter replaces the one with its title, and nothing else changes."""
    made = [Section(title=title, command=f"./{title}", text="Old.") for title in ("One", "Two", "Three")]
    new = Section(title="Two", command="./again", text="New.", violations=["lost"])
    assert replace_section(report(made), new) == report([made[0], new, made[2]])
    with pytest.raises(ValueError, match="Four"):
        replace_section(report(made), Section(title="Four", command="./x", text=""))


def test_the_rounds_come_first() -> None:
    """`./tests/faults/run` without `--report` runs the first part."""
    assert PARTS[0].__module__ == "tests.faults.rounds"


def test_no_part_is_left_out() -> None:
    """Every module that has a chapter is in the report."""
    assert {each.__module__ for each in PARTS} == {
        each.__name__ for each in (rounds, recovery, hosts, clocks, floods, proxied, soak)
    }
