"""The measuring of recoveries in its short form: how figures and bounds are told.

`python -m tests.faults.recovery` is the long form.
"""

from __future__ import annotations

from tests.faults.recovery import Found, section


def test_a_bound_that_is_missed_is_a_violation() -> None:
    """And so is what never came about; a figure within its bound, or without one, is none."""
    told: list[str] = []
    found = Found(tell=told.append)
    found.note("a worker killed", "its message done", 47.0, 60.0)
    found.note("gunicorn's master killed", "accepting again", 31.1)
    assert found.wrong == []
    found.note("PostgreSQL restarted", "accepting again", 6.0, 5.0)
    found.note("PostgreSQL restarted", "delivering again", None)
    assert (
        found.wrong
        == told[2:]
        == [
            "PostgreSQL restarted: accepting again 6.00 s (promised: 5 s)",
            "PostgreSQL restarted: delivering again never",
        ]
    )


def test_the_chapter_has_figures_bounds_and_what_was_skipped() -> None:
    """What could not be done here is no less in it than what could."""
    found = Found(tell=lambda _line: None)
    found.note("a worker killed", "its message done", 47.0, 60.0)
    found.skip("PostgreSQL out of disk: root alone can mount a small one")
    made = section(found, "python -m tests.faults.recovery")
    assert "| a worker killed | its message done | 47.00 | 60 |\n" in made.text
    assert "**Skipped**: PostgreSQL out of disk" in made.text
    assert made.violations == ()
