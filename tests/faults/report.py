"""What one part of the fault suite found out, as it stands in REPORT.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Says a line to whoever watches.
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A chapter of the report. `command` repeats it; `violations` are sentences: what did not hold."""

    title: str
    command: str
    text: str
    violations: Sequence[str] = ()
