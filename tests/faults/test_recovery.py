"""Figures, bounds and the chapter of recovery times. `python -m tests.faults.recovery` takes the measurements."""

from __future__ import annotations

from tests.faults.recovery import section
from tests.faults.recovery_times import Results


def test_a_missed_bound_is_a_violation() -> None:
    """A figure above its bound, or an event that never occurred, is a violation. Other figures are not."""
    lines: list[str] = []
    results = Results(progress=lines.append)
    results.add("worker killed", "its message handled", 47.0, 60.0)
    results.add("gunicorn master killed", "accepting again", 31.1)
    assert results.violations == []
    results.add("PostgreSQL restarted", "accepting again", 6.0, 5.0)
    results.add("PostgreSQL restarted", "delivering again", None)
    assert (
        results.violations
        == lines[2:]
        == [
            "PostgreSQL restarted: accepting again 6.00 s (promised: 5 s)",
            "PostgreSQL restarted: delivering again never",
        ]
    )


def test_the_chapter_has_figures_bounds_and_skipped_parts() -> None:
    """The chapter has each figure with its bound, and names what did not run."""
    results = Results(progress=lambda _line: None)
    results.add("worker killed", "its message handled", 47.0, 60.0)
    results.skip("PostgreSQL out of disk: only root can mount a small disk")
    made = section(results, "python -m tests.faults.recovery")
    assert "| worker killed | its message handled | 47.00 | 60 |\n" in made.text
    assert "**Skipped**: PostgreSQL out of disk" in made.text
    assert made.violations == ()
